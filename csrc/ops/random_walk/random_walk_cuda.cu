// The random walk over a given affinity of CUDA tensors: arguments, one launch or several, registration.
#include <tuple>

#include "ops/random_walk/random_walk_kernels.cuh"
#include "ops/random_walk/walk_shape.h"
#include "wsss/cuda_tensor.h"

namespace wsss::walk {
namespace {

struct Call : WalkShape {
  using WalkShape::WalkShape;

  bool in_block() const { return n <= sinkhorn::kBlockTokens && batch < (int64_t(1) << 31); }
  // Room for the sums of slices of rows.
  Tensor partials(const Tensor& like) const {
    const int64_t count = in_block() || !batch ? 0 : sinkhorn::partial_sums(n, batch, std::max<int64_t>(classes, 1));
    return wsss::new_empty(like, {count}, ScalarType::Double);
  }
  Tape tape(const Tensor& t) const {
    return {{static_cast<double*>(t.mutable_data_ptr()), n, rounds, rows() * n}, classes, power};
  }
};

// `maps` times the mask, where it applies here; otherwise `maps`.
Tensor masked(const Tensor& maps, const std::optional<Tensor>& mask, bool here, const OnDevice& device) {
  if (!mask || !here) return maps;
  Tensor result = wsss::new_empty(maps, sizes_of(maps));
  const Tensor weight = dense(*mask);
  if (maps.numel())
    for_cuda_type("random_walk", maps, [&](auto tag) {
      using T = decltype(tag);
      launch(masked_maps<T>, dim3(unsigned(blocks_for(maps.numel(), kThreads))), dim3(kThreads), 0, device.stream(),
             in<T>(maps), in<T>(weight), maps.numel(), out<T>(result));
    });
  return result;
}

// T^power (mask ⊙ cam), or mask ⊙ T^power cam, and the tape (B×rows×N) of which the backward pass is made.
std::tuple<Tensor, Tensor> random_walk_fwd(const Tensor& affinity, const Tensor& cam, std::optional<Tensor> mask,
                                           bool target, int64_t sinkhorn_iter, int64_t power) {
  const Call call(affinity, cam, mask, sinkhorn_iter, power);
  const OnDevice device(affinity);
  const Tensor a = dense(affinity), c = masked(dense(cam), mask, !target || call.still(), device);
  Tensor tape = wsss::new_empty(c, {call.batch, call.rows(), call.n}, ScalarType::Double);
  if (call.still()) return {mask ? c : torch::stable::clone(c), tape};
  Tensor result = wsss::new_empty(c, sizes_of(c));
  if (!call.batch) return {result, tape};
  const Tensor partial = call.partials(c);
  for_cuda_type("random_walk", a, [&](auto tag) {
    using T = decltype(tag);
    const Matrices<T> m{in<T>(a), call.n, call.batch};
    if (call.in_block()) {
      WSSS_PATH("random_walk.cuda.block.fwd");
      launch(forward_block<T>, dim3(unsigned(call.batch)), dim3(kThreads), 0, device.stream(), m, in<T>(c),
             call.tape(tape), out<T>(result));
    } else {
      WSSS_PATH("random_walk.cuda.launches.fwd");
      forward(sinkhorn::Launches<T>{m, device.stream(), out<double>(partial)}, in<T>(c), call.tape(tape),
              out<T>(result));
    }
  });
  return {masked(result, mask, target, device), tape};
}

// Gradients with respect to cam and, where it is wanted, the affinity (otherwise 0×N×N).
std::tuple<Tensor, Tensor> random_walk_bwd(const Tensor& grad, const Tensor& affinity, const Tensor& tape,
                                           std::optional<Tensor> mask, bool target, int64_t sinkhorn_iter,
                                           int64_t power, bool need_affinity) {
  const Call call(affinity, grad, mask, sinkhorn_iter, power);
  const OnDevice device(affinity);
  const Tensor a = dense(affinity), saved = dense(tape);
  const Tensor c = masked(dense(grad), mask, target || call.still(), device);
  call.check_tape(saved);
  Tensor grad_affinity = wsss::new_empty(a, {need_affinity ? call.batch : 0, call.n, call.n});
  if (call.still()) {
    if (grad_affinity.numel()) torch::stable::fill_(grad_affinity, 0.);
    return {mask ? c : torch::stable::clone(c), grad_affinity};
  }
  Tensor grad_cam = wsss::new_empty(c, sizes_of(c));
  if (!call.batch) return {grad_cam, grad_affinity};
  const Tensor partial = call.partials(c);
  const Tensor work = wsss::new_empty(c, {call.batch, (power + 1) * call.classes + 2, call.n}, ScalarType::Double);
  const Tensor rounds = wsss::new_empty(c, {call.batch, 2 * sinkhorn_iter, call.n}, ScalarType::Double);
  for_cuda_type("random_walk", a, [&](auto tag) {
    using T = decltype(tag);
    const Matrices<T> m{in<T>(a), call.n, call.batch};
    const Tape t = call.tape(saved);
    const Gradients g{t, {out<double>(rounds), t.s}, out<double>(work)};
    T* to = out<T>(grad_affinity);
    if (call.in_block()) {
      WSSS_PATH("random_walk.cuda.block.bwd");
      launch(backward_block<T>, dim3(unsigned(call.batch)), dim3(kThreads), 0, device.stream(), m, in<T>(c), g,
             out<T>(grad_cam), to);
    } else {
      WSSS_PATH("random_walk.cuda.launches.bwd");
      backward(sinkhorn::Launches<T>{m, device.stream(), out<double>(partial)}, in<T>(c), g, out<T>(grad_cam), to);
    }
  });
  return {masked(grad_cam, mask, !target, device), grad_affinity};
}

}  // namespace
}  // namespace wsss::walk

WSSS_CUDA_LIBRARY(m) {
  m.impl("random_walk_fwd", TORCH_BOX(&wsss::walk::random_walk_fwd));
  m.impl("random_walk_bwd", TORCH_BOX(&wsss::walk::random_walk_bwd));
}
