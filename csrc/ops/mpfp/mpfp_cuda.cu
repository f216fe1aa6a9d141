// Sign-preserving pyramid pooling of CUDA tensors: arguments, shared memory or a workspace, registration.
#include <tuple>

#include "ops/mpfp/mpfp_kernels.cuh"
#include "wsss/cuda_tensor.h"

namespace wsss::mpfp {
namespace {

Sizes sizes_for(const Tensor& feature, const std::vector<int64_t>& scales) {
  WSSS_CHECK(feature.dim() == 4 && feature.size(1) > 0 && feature.size(2) > 0 && feature.size(3) > 0,
             "mpfp: feature must be B×C×h×w with at least one channel and pixel");
  WSSS_CHECK(!scales.empty() && scales.size() <= size_t(kMaxLevels), "mpfp: 1 to ", kMaxLevels,
             " scales expected, got ", scales.size());
  WSSS_CHECK(feature.size(1) < (1 << 24) && feature.size(2) < (1 << 30) && feature.size(3) < (1 << 30) &&
                 (feature.size(2) + 2) * (feature.size(3) + 2) < (int64_t(1) << 31),
             "mpfp: the map is too large");
  Sizes s{int(feature.size(1)), int(feature.size(2)), int(feature.size(3)), int(scales.size()), {}};
  for (size_t l = 0; l < scales.size(); ++l) {
    WSSS_CHECK(scales[l] >= 1 && scales[l] < (1 << 30), "mpfp: every scale must be from 1 to 2^30, got ", scales[l]);
    s.scale[l] = int(scales[l]);
  }
  return s;
}

void check_weight(const Tensor& weight, const Tensor& feature, const Sizes& s, const char* name) {
  WSSS_CHECK(weight.dim() == 5 && weight.size(0) == s.levels - 1 && weight.size(1) == 2 &&
                 weight.size(2) == 2 * int64_t(s.channels) && weight.size(3) == 3 && weight.size(4) == 3 &&
                 weight.scalar_type() == feature.scalar_type(),
             "mpfp: ", name, " must be ", s.levels - 1, "×2×", 2 * s.channels, "×3×3 in the dtype of feature");
}

void report_shared(bool backward) {
  if (backward) {
    WSSS_PATH("mpfp.cuda.shared.bwd");
  } else {
    WSSS_PATH("mpfp.cuda.shared.fwd");
  }
}
void report_general(bool backward) {
  if (backward) {
    WSSS_PATH("mpfp.cuda.general.bwd");
  } else {
    WSSS_PATH("mpfp.cuda.general.fwd");
  }
}

template <class T, bool kBackward>
void run(const Tensor& like, const Arguments<T>& call, const Sizes& s, cudaStream_t stream) {
  using A = accumulator_t<T>;
  if (!call.batch) return;
  const Layout layout(s, kBackward);
  const int64_t bytes = layout.bytes(s, sizeof(A));
  const dim3 block(kThreads);
  if (bytes <= int64_t(max_shared_bytes()) - 2048) {  // what is left is for the block's sums
    report_shared(kBackward);
    const int64_t blocks = std::min<int64_t>(call.batch, (int64_t(1) << 31) - 1);
    launch(pyramid<T, A, kBackward>, dim3(unsigned(blocks)), block, size_t(bytes), stream, call, s, layout, nullptr, 0);
    return;
  }
  report_general(kBackward);
  const int64_t blocks = std::min<int64_t>(call.batch, 2 * multiprocessors());
  const Tensor work = new_empty(like, {blocks * bytes}, ScalarType::Byte);
  launch(pyramid<T, A, kBackward>, dim3(unsigned(blocks)), block, 0, stream, call, s, layout,
         static_cast<unsigned char*>(work.mutable_data_ptr()), bytes);
}

std::tuple<Tensor, Tensor> fwd(const Tensor& feature, const Tensor& weight_pos, const Tensor& weight_neg,
                               std::vector<int64_t> scales) {
  const Sizes s = sizes_for(feature, scales);
  check_weight(weight_pos, feature, s, "weight_pos");
  check_weight(weight_neg, feature, s, "weight_neg");
  const OnDevice device(feature);
  const Tensor x = dense(feature), pos = dense(weight_pos), neg = dense(weight_neg);
  Tensor logit = new_empty(feature, std::vector<int64_t>{x.size(0), x.size(1)}), fused = new_empty(x, sizes_of(x));
  for_cuda_type("mpfp", feature, [&](auto tag) {
    using T = decltype(tag);
    Arguments<T> call{};
    call.feature = in<T>(x);
    call.pos = in<T>(pos);
    call.neg = in<T>(neg);
    call.logit = out<T>(logit);
    call.fused = out<T>(fused);
    call.batch = x.size(0);
    run<T, false>(x, call, s, device.stream());
  });
  return {logit, fused};
}

std::tuple<Tensor, Tensor, Tensor> bwd(const Tensor& feature, const Tensor& weight_pos, const Tensor& weight_neg,
                                       const Tensor& grad_logit, const Tensor& grad_fused,
                                       std::vector<int64_t> scales) {
  const Sizes s = sizes_for(feature, scales);
  check_weight(weight_pos, feature, s, "weight_pos");
  check_weight(weight_neg, feature, s, "weight_neg");
  WSSS_CHECK(grad_logit.numel() == feature.size(0) * feature.size(1) && grad_fused.numel() == feature.numel(),
             "mpfp: the gradients must have the sizes of logit and fused");
  const OnDevice device(feature);
  const Tensor x = dense(feature), pos = dense(weight_pos), neg = dense(weight_neg);
  const Tensor to_logit = dense(grad_logit), to_fused = dense(grad_fused);
  Tensor dx = new_empty(x, sizes_of(x)), dpos = new_empty(pos, sizes_of(pos)), dneg = new_empty(neg, sizes_of(neg));
  const int64_t weights = (s.levels - 1) * s.inputs() * 4;
  const Tensor parts = new_empty(x, std::vector<int64_t>{x.size(0), weights}, ScalarType::Double);
  for_cuda_type("mpfp", feature, [&](auto tag) {
    using T = decltype(tag);
    using A = accumulator_t<T>;
    const Arguments<T> call{in<T>(x), in<T>(pos), in<T>(neg), in<T>(to_logit),    in<T>(to_fused),
                            nullptr,  nullptr,    out<T>(dx), out<double>(parts), x.size(0)};
    run<T, true>(x, call, s, device.stream());
    if (weights)
      launch(add_parts<T, A>, dim3(unsigned(blocks_for(weights, kThreads))), dim3(kThreads), 0, device.stream(),
             in<double>(parts), x.size(0), int64_t(s.levels - 1), s.inputs(), out<T>(dpos), out<T>(dneg));
  });
  return {dx, dpos, dneg};
}

}  // namespace
}  // namespace wsss::mpfp

WSSS_CUDA_LIBRARY(m) {
  m.impl("mpfp_fwd", TORCH_BOX(&wsss::mpfp::fwd));
  m.impl("mpfp_bwd", TORCH_BOX(&wsss::mpfp::bwd));
}
