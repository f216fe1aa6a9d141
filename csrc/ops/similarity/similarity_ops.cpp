// Operators of similarity: arguments, threads over blocks of pixels, registration.
#include "wsss/tensor.h"

namespace wsss {
namespace similarity {
namespace {

constexpr int64_t kBlock = 64;     // pixels of a block
constexpr int64_t kChannels = 16;  // of the text's gradient, per task

struct Shape {
  int64_t batch, channels, pixels, classes;
  bool normalize;

  int64_t blocks() const { return (pixels + kBlock - 1) / kBlock; }
  int64_t count(int64_t block) const { return std::min(kBlock, pixels - block * kBlock); }
};

#define WSSS_CPU_KERNELS "ops/similarity/similarity_cpu.inc"
#include "wsss/cpu_kernels.h"

WSSS_PICK(maps)
WSSS_PICK(largest)
WSSS_PICK(block_backward)
WSSS_PICK(text_gradient)
WSSS_PICK(pool_backward)

Shape shape_of(const Tensor& visual, const Tensor& text, const Tensor& scale, bool normalize) {
  WSSS_CHECK(visual.dim() == 4 && text.dim() == 2 && visual.size(1) == text.size(1) && visual.size(2) > 0 &&
                 visual.size(3) > 0,
             "text_similarity: visual B×C×h×w and text K×C expected");
  WSSS_CHECK(
      scale.numel() == 1 && scale.scalar_type() == visual.scalar_type() && text.scalar_type() == visual.scalar_type(),
      "text_similarity: visual, text and scale must have one dtype, scale one element");
  return {visual.size(0), visual.size(1), visual.size(2) * visual.size(3), text.size(0), normalize};
}

Tensor map_fwd(const Tensor& visual, const Tensor& text, const Tensor& scale, bool normalize) {
  const Shape s = shape_of(visual, text, scale, normalize);
  const Tensor x = dense(visual), t = dense(text);
  Tensor result = wsss::new_empty(visual, std::vector<int64_t>{s.batch, s.classes, visual.size(2), visual.size(3)});
  WSSS_PATH("text_similarity.fwd");
  for_float_type("text_similarity", visual, [&](auto tag) {
    using T = decltype(tag);
    const T *px = in<T>(x), *pt = in<T>(t), factor = *in<T>(scale);
    T* y = out<T>(result);
    parallel_for(0, s.batch * s.blocks(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / s.blocks(), block = i % s.blocks(), at = block * kBlock;
        maps(tag)(s, px + b * s.channels * s.pixels + at, pt, factor, s.count(block),
                  y + b * s.classes * s.pixels + at);
      }
    });
  });
  return result;
}

std::tuple<Tensor, Tensor> pool_fwd(const Tensor& visual, const Tensor& text, const Tensor& scale, bool normalize) {
  const Shape s = shape_of(visual, text, scale, normalize);
  const Tensor x = dense(visual), t = dense(text);
  Tensor result = wsss::new_empty(visual, std::vector<int64_t>{s.batch, s.classes});
  Tensor position = wsss::new_empty(visual, std::vector<int64_t>{s.batch, s.classes}, ScalarType::Long);
  WSSS_PATH("text_similarity_pool.fwd");
  for_float_type("text_similarity_pool", visual, [&](auto tag) {
    using T = decltype(tag);
    const T *px = in<T>(x), *pt = in<T>(t), factor = *in<T>(scale);
    Buffer<T> value(s.batch * s.blocks() * s.classes);
    Buffer<int64_t> index(value.size());
    parallel_for(0, s.batch * s.blocks(), 1, [&](int64_t begin, int64_t end) {
      Buffer<T> tile(s.classes * kBlock);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / s.blocks(), block = i % s.blocks();
        largest(tag)(s, px + b * s.channels * s.pixels + block * kBlock, pt, factor, s.count(block),
                     value.data() + i * s.classes, index.data() + i * s.classes, tile.data());
      }
    });
    T* best = out<T>(result);
    int64_t* at = out<int64_t>(position);
    for (int64_t b = 0; b < s.batch; ++b)
      for (int64_t k = 0; k < s.classes; ++k) {
        T found = value[b * s.blocks() * s.classes + k];
        int64_t where = index[b * s.blocks() * s.classes + k];
        for (int64_t block = 1; block < s.blocks() && found == found; ++block) {
          const int64_t cell = (b * s.blocks() + block) * s.classes + k;
          if (value[cell] > found || value[cell] != value[cell])
            found = value[cell], where = block * kBlock + index[cell];
        }
        best[b * s.classes + k] = found;
        at[b * s.classes + k] = where;
      }
  });
  return {result, position};
}

template <class T>
void put_total(const Buffer<double>& parts, const Tensor& scale) {
  double sum = 0.;
  for (int64_t i = 0; i < parts.size(); ++i) sum += parts[i];
  *out<T>(scale) = T(sum);
}

std::tuple<Tensor, Tensor, Tensor> map_bwd(const Tensor& visual, const Tensor& text, const Tensor& scale,
                                           const Tensor& grad, bool normalize) {
  const Shape s = shape_of(visual, text, scale, normalize);
  WSSS_CHECK(grad.numel() == s.batch * s.classes * s.pixels,
             "text_similarity: the gradient must have the result's size");
  const Tensor x = dense(visual), t = dense(text), g = dense(grad);
  Tensor dx = torch::stable::empty_like(x), dt = torch::stable::empty_like(t),
         dscale = torch::stable::empty_like(scale);
  WSSS_PATH("text_similarity.bwd");
  for_float_type("text_similarity", visual, [&](auto tag) {
    using T = decltype(tag);
    const T *px = in<T>(x), *pt = in<T>(t), *pg = in<T>(g), factor = *in<T>(scale);
    T *to = out<T>(dx), *to_text = out<T>(dt);
    Buffer<T> weight(s.batch * s.classes * s.pixels);
    Buffer<double> totals(s.batch * s.blocks());
    parallel_for(0, s.batch * s.blocks(), 1, [&](int64_t begin, int64_t end) {
      Buffer<T> tile(s.classes * kBlock);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / s.blocks(), block = i % s.blocks(), at = block * kBlock;
        const int64_t pixel = b * s.channels * s.pixels + at, cell = b * s.classes * s.pixels + at;
        totals[i] = block_backward(tag)(s, px + pixel, pt, factor, s.count(block), pg + cell, to + pixel,
                                        weight.data() + cell, tile.data());
      }
    });
    parallel_for(0, (s.channels + kChannels - 1) / kChannels, 1, [&](int64_t begin, int64_t end) {
      text_gradient(tag)(s, px, weight.data(), begin * kChannels, std::min(end * kChannels, s.channels), to_text);
    });
    put_total<T>(totals, dscale);
  });
  return {dx, dt, dscale};
}

std::tuple<Tensor, Tensor, Tensor> pool_bwd(const Tensor& visual, const Tensor& text, const Tensor& scale,
                                            const Tensor& index, const Tensor& grad, bool normalize) {
  const Shape s = shape_of(visual, text, scale, normalize);
  WSSS_CHECK(
      grad.numel() == s.batch * s.classes && index.numel() == grad.numel() && index.scalar_type() == ScalarType::Long,
      "text_similarity_pool: index (int64) and gradient must have the result's size");
  const Tensor x = dense(visual), t = dense(text), g = dense(grad), at = dense(index);
  Tensor dx = torch::stable::empty_like(x), dt = torch::stable::empty_like(t),
         dscale = torch::stable::empty_like(scale);
  const int64_t* position = in<int64_t>(at);
  for (int64_t i = 0; i < at.numel(); ++i)
    WSSS_CHECK(position[i] >= 0 && position[i] < s.pixels, "text_similarity_pool: index outside the map");
  WSSS_PATH("text_similarity_pool.bwd");
  for_float_type("text_similarity_pool", visual, [&](auto tag) {
    using T = decltype(tag);
    const T *px = in<T>(x), *pt = in<T>(t), *pg = in<T>(g), factor = *in<T>(scale);
    T *to = out<T>(dx), *to_text = out<T>(dt);
    const int64_t cells = s.classes * s.channels;
    Buffer<T> rows(s.batch * cells);
    Buffer<double> totals(s.batch);
    parallel_for(0, s.batch, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b)
        totals[b] = pool_backward(tag)(s, px + b * s.channels * s.pixels, pt, factor, position + b * s.classes,
                                       pg + b * s.classes, to + b * s.channels * s.pixels, rows.data() + b * cells);
    });
    for (int64_t i = 0; i < cells; ++i) {
      double sum = 0.;
      for (int64_t b = 0; b < s.batch; ++b) sum += double(rows[b * cells + i]);
      to_text[i] = T(sum);
    }
    put_total<T>(totals, dscale);
  });
  return {dx, dt, dscale};
}

}  // namespace
}  // namespace similarity
}  // namespace wsss

STABLE_TORCH_LIBRARY_FRAGMENT(wsss, m) {
  m.def("text_similarity_fwd(Tensor visual, Tensor text, Tensor scale, bool normalize) -> Tensor");
  m.def(
      "text_similarity_bwd(Tensor visual, Tensor text, Tensor scale, Tensor grad, bool normalize) -> (Tensor, Tensor, "
      "Tensor)");
  m.def("text_similarity_pool_fwd(Tensor visual, Tensor text, Tensor scale, bool normalize) -> (Tensor, Tensor)");
  m.def(
      "text_similarity_pool_bwd(Tensor visual, Tensor text, Tensor scale, Tensor index, Tensor grad, bool normalize) "
      "-> "
      "(Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(wsss, CPU, m) {
  m.impl("text_similarity_fwd", TORCH_BOX(&wsss::similarity::map_fwd));
  m.impl("text_similarity_bwd", TORCH_BOX(&wsss::similarity::map_bwd));
  m.impl("text_similarity_pool_fwd", TORCH_BOX(&wsss::similarity::pool_fwd));
  m.impl("text_similarity_pool_bwd", TORCH_BOX(&wsss::similarity::pool_bwd));
}
