// Operators of mpfp: arguments, tables, one thread per sample, registration.
#include "wsss/tensor.h"
#include "ops/mpfp/mpfp_math.h"

namespace wsss {
namespace mpfp {
namespace {

#define WSSS_CPU_KERNELS "ops/mpfp/mpfp_cpu.inc"
#include "wsss/cpu_kernels.h"

WSSS_PICK(forward)
WSSS_PICK(backward)

constexpr int64_t kRegisters = 32;  // rows are a multiple of two vector registers of the widest level

struct Tables {
  std::vector<std::vector<Bin>> bins;
  std::vector<std::vector<Tap>> taps;
  std::vector<Level> levels;
  Plan plan{};

  Tables(const Tensor& feature, const std::vector<int64_t>& scales) {
    WSSS_CHECK(feature.dim() == 4 && feature.size(1) > 0 && feature.size(2) > 0 && feature.size(3) > 0,
               "mpfp: feature must be B×C×h×w with at least one channel and pixel");
    WSSS_CHECK(!scales.empty(), "mpfp: scales must not be empty");
    const int64_t height = feature.size(2), width = feature.size(3);
    for (const int64_t scale : scales) {
      WSSS_CHECK(scale >= 1, "mpfp: every scale must be at least 1, got ", scale);
      axis(height, scale);
      axis(width, scale);
      levels.push_back(
          {scale, bins[bins.size() - 2].data(), bins.back().data(), taps[taps.size() - 2].data(), taps.back().data()});
      plan.largest = std::max(plan.largest, scale);
    }
    plan.channels = feature.size(1);
    plan.height = height;
    plan.width = width;
    plan.levels = int64_t(scales.size());
    plan.stride = (width + kRegisters - 1) / kRegisters * kRegisters;
    plan.padded = plan.stride + 16;
    plan.level = levels.data();
  }

  void axis(int64_t size, int64_t scale) {
    std::vector<Bin> bin;
    std::vector<Tap> tap;
    for (int64_t i = 0; i < scale; ++i) bin.push_back(pool_bin(i, size, scale));
    for (int64_t i = 0; i < size; ++i) tap.push_back(upsample_tap(i, size, scale));
    bins.push_back(std::move(bin));
    taps.push_back(std::move(tap));
  }
};

void check_weight(const Tensor& weight, const Tensor& feature, const Plan& p, const char* name) {
  WSSS_CHECK(weight.dim() == 5 && weight.size(0) == p.fusions() && weight.size(1) == 2 &&
                 weight.size(2) == 2 * p.channels && weight.size(3) == 3 && weight.size(4) == 3 &&
                 weight.scalar_type() == feature.scalar_type(),
             "mpfp: ", name, " must be ", p.fusions(), "×2×", 2 * p.channels, "×3×3 in the dtype of feature");
}

// [fusion][2C][9][pos 1, pos 2, neg 1, neg 2] from two [fusion][2][2C][9].
template <class T>
Buffer<T> packed(const Plan& p, const T* pos, const T* neg) {
  const int64_t inputs = 2 * p.channels * 9;
  Buffer<T> all(std::max<int64_t>(1, p.fusions() * p.taps()));
  for (int64_t s = 0; s < p.fusions(); ++s)
    for (int64_t i = 0; i < inputs; ++i)
      for (int64_t o = 0; o < 2; ++o) {
        all[s * p.taps() + i * 4 + o] = pos[(s * 2 + o) * inputs + i];
        all[s * p.taps() + i * 4 + 2 + o] = neg[(s * 2 + o) * inputs + i];
      }
  return all;
}

std::tuple<Tensor, Tensor> fwd(const Tensor& feature, const Tensor& weight_pos, const Tensor& weight_neg,
                               std::vector<int64_t> scales) {
  const Tables tables(feature, scales);
  const Plan& p = tables.plan;
  check_weight(weight_pos, feature, p, "weight_pos");
  check_weight(weight_neg, feature, p, "weight_neg");
  WSSS_PATH("mpfp.fwd");
  const Tensor x = torch::stable::contiguous(feature);
  const Tensor pos = torch::stable::contiguous(weight_pos), neg = torch::stable::contiguous(weight_neg);
  Tensor logit = wsss::new_empty(feature, std::vector<int64_t>{feature.size(0), p.channels}),
         fused = torch::stable::empty_like(x);
  for_float_type("mpfp", feature, [&](auto tag) {
    using T = decltype(tag);
    const Buffer<T> weight = packed(p, in<T>(pos), in<T>(neg));
    const auto kernel = forward(tag);
    const int64_t sample = p.channels * p.height * p.width;
    parallel_for(0, feature.size(0), 1,
                 [&, f = in<T>(x), l = out<T>(logit), y = out<T>(fused)](int64_t begin, int64_t end) {
                   Buffer<T> work(p.forward_cells());
                   for (int64_t b = begin; b < end; ++b)
                     kernel(p, f + b * sample, weight.data(), l + b * p.channels, y + b * sample, work.data());
                 });
  });
  return {logit, fused};
}

std::tuple<Tensor, Tensor, Tensor> bwd(const Tensor& feature, const Tensor& weight_pos, const Tensor& weight_neg,
                                       const Tensor& grad_logit, const Tensor& grad_fused,
                                       std::vector<int64_t> scales) {
  const Tables tables(feature, scales);
  const Plan& p = tables.plan;
  check_weight(weight_pos, feature, p, "weight_pos");
  check_weight(weight_neg, feature, p, "weight_neg");
  WSSS_CHECK(grad_logit.numel() == feature.size(0) * p.channels && grad_fused.numel() == feature.numel(),
             "mpfp: the gradients must have the sizes of logit and fused");
  WSSS_PATH("mpfp.bwd");
  const Tensor x = torch::stable::contiguous(feature), gl = torch::stable::contiguous(grad_logit);
  const Tensor gf = torch::stable::contiguous(grad_fused);
  const Tensor pos = torch::stable::contiguous(weight_pos), neg = torch::stable::contiguous(weight_neg);
  Tensor dx = torch::stable::empty_like(x), dpos = torch::stable::empty_like(pos),
         dneg = torch::stable::empty_like(neg);
  for_float_type("mpfp", feature, [&](auto tag) {
    using T = decltype(tag);
    const Buffer<T> weight = packed(p, in<T>(pos), in<T>(neg));
    const auto kernel = backward(tag);
    const int64_t sample = p.channels * p.height * p.width, batch = feature.size(0), taps = p.fusions() * p.taps();
    Buffer<double> parts(std::max<int64_t>(1, batch * taps));
    parallel_for(0, batch, 1,
                 [&, f = in<T>(x), l = in<T>(gl), g = in<T>(gf), d = out<T>(dx)](int64_t begin, int64_t end) {
                   Buffer<T> work(p.backward_cells());
                   for (int64_t b = begin; b < end; ++b)
                     kernel(p, f + b * sample, weight.data(), l + b * p.channels, g + b * sample, d + b * sample,
                            &parts[b * taps], work.data());
                 });
    T *to_pos = out<T>(dpos), *to_neg = out<T>(dneg);
    const int64_t inputs = 2 * p.channels * 9;
    for (int64_t i = 0; i < taps; ++i) {
      double sum = 0.;
      for (int64_t b = 0; b < batch; ++b) sum += parts[b * taps + i];
      const int64_t fusion = i / p.taps(), input = i % p.taps() / 4, gate = i % 4;
      (gate < 2 ? to_pos : to_neg)[(fusion * 2 + gate % 2) * inputs + input] = T(sum);
    }
  });
  return {dx, dpos, dneg};
}

}  // namespace
}  // namespace mpfp
}  // namespace wsss

STABLE_TORCH_LIBRARY_FRAGMENT(wsss, m) {
  m.def("mpfp_fwd(Tensor feature, Tensor weight_pos, Tensor weight_neg, int[] scales) -> (Tensor, Tensor)");
  m.def(
      "mpfp_bwd(Tensor feature, Tensor weight_pos, Tensor weight_neg, Tensor grad_logit, Tensor grad_fused, int[] "
      "scales) -> "
      "(Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(wsss, CPU, m) {
  m.impl("mpfp_fwd", TORCH_BOX(&wsss::mpfp::fwd));
  m.impl("mpfp_bwd", TORCH_BOX(&wsss::mpfp::bwd));
}
