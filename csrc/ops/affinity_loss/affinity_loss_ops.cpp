// The affinity loss: labels, threads, sums in a fixed order, registration.
#include <algorithm>
#include <string>
#include <tuple>

#include "ops/affinity_loss/affinity_loss_math.h"
#include "wsss/tensor.h"

namespace wsss {
namespace affinity_loss {

#define WSSS_CPU_KERNELS "ops/affinity_loss/affinity_loss_cpu.inc"
#include "wsss/cpu_kernels.h"

#define WSSS_PICK(name)                                    \
  static auto name(float) { return WSSS_CPU(name##_f32); } \
  static auto name(double) { return WSSS_CPU(name##_f64); }
WSSS_PICK(cell_rows)
WSSS_PICK(forward_block)
WSSS_PICK(backward_block)
#undef WSSS_PICK

// One image in the layout of the kernels.
template <class T>
struct Image {
  Image(const T* feature, const int64_t* label, const std::vector<int64_t>& names, int64_t ignore_index, int64_t depth_,
        int64_t h, int64_t w, int64_t radius_)
      : count(h * w),
        depth(depth_),
        radius(radius_),
        rows(pair_padded(count) * pair_stride(depth)),
        id(pair_padded(count)),
        y(id.size()),
        x(id.size()) {
    parallel_for(0, pair_padded(count) / kPairStrip, 1, [&](int64_t b, int64_t e) {
      cell_rows(T{})(feature, count, depth, b * kPairStrip, e * kPairStrip, rows.data());
    });
    for (int64_t i = 0; i < id.size(); ++i) {
      const bool used = i < count && label[i] != ignore_index;
      id[i] = used ? T(std::lower_bound(names.begin(), names.end(), label[i]) - names.begin()) : T(-1);
      y[i] = T(i / w), x[i] = T(i % w);
    }
  }
  Cells<T> cells() const { return {rows.data(), id.data(), y.data(), x.data(), count, depth, T(radius)}; }
  int64_t count, depth, radius;
  Buffer<T> rows, id, y, x;
};

// A call's tensors, contiguous, and what it asks for.
struct Call {
  Call(const Tensor& feature_, const Tensor& label_, const std::string& kind_, int64_t radius_, int64_t ignore_index_)
      : feature(torch::stable::contiguous(feature_)),
        label(torch::stable::contiguous(label_)),
        kind(kind_ == "bce" ? Kind::kBce : Kind::kBalanced),
        radius(radius_),
        ignore_index(ignore_index_) {
    WSSS_CHECK(feature.dim() == 4 && label.dim() == 3 && label.scalar_type() == ScalarType::Long &&
                   feature.size(0) == label.size(0) && feature.size(2) == label.size(1) &&
                   feature.size(3) == label.size(2) && feature.size(1) > 0,
               "affinity_loss: feature B×d×h×w and int64 label B×h×w expected");
    const int64_t* given = in<int64_t>(label);
    names.assign(given, given + label.numel());
    std::sort(names.begin(), names.end());
    names.erase(std::unique(names.begin(), names.end()), names.end());
  }
  int64_t images() const { return feature.size(0); }
  int64_t cells() const { return feature.size(2) * feature.size(3); }
  template <class T>
  Image<T> image(int64_t b) const {
    return Image<T>(in<T>(feature) + b * feature.size(1) * cells(), in<int64_t>(label) + b * cells(), names,
                    ignore_index, feature.size(1), feature.size(2), feature.size(3), radius);
  }
  Tensor feature, label;
  Kind kind;
  int64_t radius, ignore_index;
  std::vector<int64_t> names;
};

// Adds Σ over positive pairs, Σ over negative pairs and their numbers of one image to sums[4].
template <class T>
static void add_image(const Image<T>& image, Kind kind, double* sums) {
  const int64_t block = pair_block(image.count), blocks = ceil_div(image.count, block);
  Buffer<double> parts(4 * blocks);
  // An early block meets many rows and a late one few: one of each is a fair share.
  parallel_for(0, ceil_div(blocks, 2), 1, [&](int64_t b, int64_t e) {
    Buffer<T> strips(image.depth * block), tile(kPairStrip * block);
    const auto run = [&](int64_t i) {
      forward_block(T{})(image.cells(), kind, i * block, block, strips.data(), tile.data(), parts.data() + 4 * i);
    };
    for (int64_t i = b; i < e; ++i) {
      run(i);
      if (blocks - 1 - i != i) run(blocks - 1 - i);
    }
  });
  for (int64_t i = 0; i < 4 * blocks; ++i) sums[i % 4] += parts[i];
}

static std::tuple<Tensor, Tensor> fwd(const Tensor& feature, const Tensor& label, std::string kind, int64_t radius,
                                      int64_t ignore_index) {
  const Call call(feature, label, kind, radius, ignore_index);
  Tensor loss = new_empty(feature, std::vector<int64_t>{}),
         counts = new_empty(feature, std::vector<int64_t>{2}, ScalarType::Double);
  for_float_type("affinity_loss", feature, [&](auto tag) {
    using T = decltype(tag);
    WSSS_PATH("affinity_loss.cpu");
    double sums[4] = {};
    for (int64_t b = 0; b < call.images(); ++b) add_image(call.image<T>(b), call.kind, sums);
    if (call.kind == Kind::kBce)
      *out<T>(loss) = T((sums[0] + sums[1]) / std::max(1., sums[2] + sums[3]));
    else
      *out<T>(loss) = T(.5 * sums[0] / (sums[2] + 1.) + .5 * sums[1] / (sums[3] + 1.));
    std::copy_n(sums + 2, 2, out<double>(counts));
  });
  return {loss, counts};
}

static Tensor bwd(const Tensor& feature, const Tensor& label, const Tensor& counts, const Tensor& grad,
                  std::string kind, int64_t radius, int64_t ignore_index) {
  const Call call(feature, label, kind, radius, ignore_index);
  WSSS_CHECK(counts.numel() == 2 && counts.scalar_type() == ScalarType::Double && grad.numel() == 1,
             "affinity_loss_bwd: two counts and a gradient of one element expected");
  Tensor result =
      new_empty(feature, std::vector<int64_t>{feature.size(0), feature.size(1), feature.size(2), feature.size(3)});
  const Tensor kept = torch::stable::contiguous(counts);
  const double positives = in<double>(kept)[0], negatives = in<double>(kept)[1];
  for_float_type("affinity_loss", feature, [&](auto tag) {
    using T = decltype(tag);
    const double g = double(*in<T>(grad)), all = std::max(1., positives + negatives);
    // An inner product belongs to both of its cells, and every pair counts in both orders.
    const T weight_positive = T(call.kind == Kind::kBce ? 2. * g / all : g / (positives + 1.));
    const T weight_negative = T(call.kind == Kind::kBce ? 2. * g / all : g / (negatives + 1.));
    for (int64_t b = 0; b < call.images(); ++b) {
      const Image<T> image = call.image<T>(b);
      const int64_t block = pair_block(image.count);
      T* gradient = out<T>(result) + b * image.depth * image.count;
      parallel_for(0, ceil_div(image.count, block), 1, [&](int64_t i, int64_t e) {
        Buffer<T> strips(image.depth * block), tile(kPairRows * block), sums(pair_round(image.depth) * block);
        for (; i < e; ++i)
          backward_block(T{})(image.cells(), call.kind, i * block, block, weight_positive, weight_negative,
                              strips.data(), tile.data(), sums.data(), gradient);
      });
    }
  });
  return result;
}

}  // namespace affinity_loss
}  // namespace wsss

STABLE_TORCH_LIBRARY_FRAGMENT(wsss, m) {
  m.def("affinity_loss_fwd(Tensor feature, Tensor label, str kind, int radius, int ignore_index) -> (Tensor, Tensor)");
  m.def(
      "affinity_loss_bwd(Tensor feature, Tensor label, Tensor counts, Tensor grad, str kind, int radius, int "
      "ignore_index) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(wsss, CPU, m) {
  m.impl("affinity_loss_fwd", TORCH_BOX(&wsss::affinity_loss::fwd));
  m.impl("affinity_loss_bwd", TORCH_BOX(&wsss::affinity_loss::bwd));
}
