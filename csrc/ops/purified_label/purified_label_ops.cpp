// Operators of purified_label: arguments, threads over chunks of pixels, sums in their order, registration.
#include "ops/purified_label/checks.h"

namespace wsss {
namespace purified_label {
namespace {

constexpr int64_t kChunk = 4096;  // pixels

struct Shape {
  int64_t batch, classes, pixels, ignore_index;

  int64_t chunks() const { return (pixels + kChunk - 1) / kChunk; }
  int64_t count(int64_t chunk) const { return std::min(kChunk, pixels - chunk * kChunk); }
};

// What is known of some valid pixels.
struct Seen {
  double smallest_loss = 0.;
  int64_t pixels = 0;
  int32_t smallest_label = 0, largest_label = 0;

  void add(const Seen& other) {
    if (!other.pixels) return;
    smallest_loss = pixels && !(other.smallest_loss < smallest_loss) ? smallest_loss : other.smallest_loss;
    smallest_label = pixels ? std::min(smallest_label, other.smallest_label) : other.smallest_label;
    largest_label = pixels ? std::max(largest_label, other.largest_label) : other.largest_label;
    pixels += other.pixels;
  }
};

#define WSSS_CPU_KERNELS "ops/purified_label/purified_label_cpu.inc"
#include "wsss/cpu_kernels.h"

WSSS_PICK(chunk_losses)
WSSS_PICK(chunk_weights)
WSSS_PICK(chunk_total)
WSSS_PICK(chunk_backward)

Shape shape_of(const Tensor& logit, const Tensor& label, int64_t ignore_index) {
  check_maps(logit, label);
  return {logit.size(0), logit.size(1), logit.size(2) * logit.size(3), ignore_index};
}

// body(image, chunk, task): one task per chunk of every image.
template <class F>
void for_chunks(const Shape& s, const F& body) {
  parallel_for(0, s.batch * s.chunks(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i / s.chunks(), i % s.chunks(), i);
  });
}

template <class T>
double losses(const Shape& s, const T* logit, const int64_t* label, T* weight) {
  const T tag{};
  const int64_t tasks = s.batch * s.chunks();
  Buffer<T> loss(s.batch * s.pixels), confidence(s.batch * s.pixels);
  std::vector<Seen> seen(static_cast<size_t>(tasks)), image(static_cast<size_t>(s.batch));
  std::vector<double> sums(static_cast<size_t>(tasks));
  std::vector<char> valid(static_cast<size_t>(tasks));
  for_chunks(s, [&](int64_t b, int64_t chunk, int64_t i) {
    const int64_t at = b * s.pixels + chunk * kChunk;
    valid[size_t(i)] = chunk_losses(tag)(s, logit + b * s.classes * s.pixels + chunk * kChunk, label + at,
                                         s.count(chunk), loss.data() + at, confidence.data() + at, seen[size_t(i)]);
  });
  for (int64_t i = 0; i < tasks; ++i) {
    WSSS_CHECK(valid[size_t(i)], "purified_label_loss: label must hold classes 0 to ", s.classes - 1,
               " or ignore_index ", s.ignore_index);
    image[size_t(i / s.chunks())].add(seen[size_t(i)]);
  }
  for_chunks(s, [&](int64_t b, int64_t chunk, int64_t i) {
    const int64_t at = b * s.pixels + chunk * kChunk;
    sums[size_t(i)] = chunk_weights(tag)(s.count(chunk), loss.data() + at, confidence.data() + at,
                                         T(image[size_t(b)].smallest_loss), weight + at);
  });
  std::vector<double> normalizer(size_t(s.batch), 0.);
  for (int64_t i = 0; i < tasks; ++i) normalizer[size_t(i / s.chunks())] += sums[size_t(i)];
  for_chunks(s, [&](int64_t b, int64_t chunk, int64_t i) {
    const int64_t at = b * s.pixels + chunk * kChunk;
    const Seen& all = image[size_t(b)];
    const bool single = all.smallest_label == all.largest_label;
    const double divisor = double(s.batch) * (single ? double(all.pixels) : normalizer[size_t(b)]);
    sums[size_t(i)] = chunk_total(tag)(s.count(chunk), loss.data() + at, confidence.data() + at, single,
                                       T(all.pixels ? 1. / divisor : 0.), weight + at);
  });
  double total = 0.;
  for (const double sum : sums) total += sum;
  return total;
}

std::tuple<Tensor, Tensor> fwd(const Tensor& logit, const Tensor& label, int64_t ignore_index) {
  const Shape s = shape_of(logit, label, ignore_index);
  const Tensor x = dense(logit), y = dense(label);
  Tensor result = wsss::new_empty(logit, std::vector<int64_t>{});
  Tensor weight = wsss::new_empty(logit, std::vector<int64_t>{s.batch, logit.size(2), logit.size(3)});
  WSSS_PATH("purified_label.fwd");
  for_float_type("purified_label_loss", logit, [&](auto tag) {
    using T = decltype(tag);
    *out<T>(result) = T(losses<T>(s, in<T>(x), in<int64_t>(y), out<T>(weight)));
  });
  return {result, weight};
}

Tensor bwd(const Tensor& logit, const Tensor& label, const Tensor& weight, const Tensor& grad, int64_t ignore_index) {
  const Shape s = shape_of(logit, label, ignore_index);
  WSSS_CHECK(weight.numel() == label.numel() && grad.numel() == 1,
             "purified_label_loss: one weight per pixel, one gradient");
  const Tensor x = dense(logit), y = dense(label), w = dense(weight), g = dense(grad);
  Tensor dlogit = torch::stable::empty_like(x);
  WSSS_PATH("purified_label.bwd");
  for_float_type("purified_label_loss", logit, [&](auto tag) {
    using T = decltype(tag);
    const T *px = in<T>(x), *pw = in<T>(w), factor = *in<T>(g);
    const int64_t* py = in<int64_t>(y);
    T* to = out<T>(dlogit);
    for_chunks(s, [&](int64_t b, int64_t chunk, int64_t) {
      const int64_t at = b * s.pixels + chunk * kChunk, cell = b * s.classes * s.pixels + chunk * kChunk;
      chunk_backward(tag)(s, px + cell, py + at, pw + at, factor, s.count(chunk), to + cell);
    });
  });
  return dlogit;
}

}  // namespace
}  // namespace purified_label
}  // namespace wsss

STABLE_TORCH_LIBRARY_FRAGMENT(wsss, m) {
  m.def("purified_label_fwd(Tensor logit, Tensor label, int ignore_index) -> (Tensor, Tensor)");
  m.def("purified_label_bwd(Tensor logit, Tensor label, Tensor weight, Tensor grad, int ignore_index) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(wsss, CPU, m) {
  m.impl("purified_label_fwd", TORCH_BOX(&wsss::purified_label::fwd));
  m.impl("purified_label_bwd", TORCH_BOX(&wsss::purified_label::bwd));
}
