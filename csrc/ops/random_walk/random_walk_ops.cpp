// Schema and CPU registration of the random walk over a given affinity.
#include <tuple>

#include "ops/random_walk/walk.h"

namespace wsss {
namespace {

// T^power (mask ⊙ cam), or mask ⊙ T^power cam, and the tape (B×rows×N) of which the backward pass is made.
std::tuple<Tensor, Tensor> random_walk_fwd(const Tensor& affinity, const Tensor& cam, const std::optional<Tensor>& mask,
                                           bool target, int64_t sinkhorn_iter, int64_t power) {
  const WalkShape d(affinity, cam, mask, sinkhorn_iter, power);
  const Tensor a = dense(affinity), c = dense(cam);
  const auto weight = dense(mask);
  const int64_t rows = d.rows();
  Tensor result = wsss::new_empty(c, sizes_of(c)), tape = wsss::new_empty(c, {d.batch, rows, d.n}, ScalarType::Double);
  for_float_type("random_walk", a, [&](auto tag) {
    using T = decltype(tag);
    if (d.still()) {
      stand_still(in<T>(c), WalkMask<T>(weight, target, 0), c.numel(), out<T>(result));
      return;
    }
    WSSS_PATH("random_walk.forward");
    if (d.n <= 192) WSSS_PATH("random_walk.forward.small");
    for_each_matrix(d.batch, d.n, [&](int64_t b) {
      const StoredRows<T> source{in<T>(a) + b * d.n * d.n, d.n, d.n};
      const Tape t{out<double>(tape) + b * rows * d.n, d.n, d.classes, sinkhorn_iter, power};
      const int64_t at = b * d.classes * d.n;
      walk_forward(source, in<T>(c) + at, WalkMask<T>(weight, target, at), t, out<T>(result) + at);
    });
  });
  return {result, tape};
}

// Gradients with respect to cam and, where it is wanted, the affinity (otherwise 0×N×N).
std::tuple<Tensor, Tensor> random_walk_bwd(const Tensor& grad, const Tensor& affinity, const Tensor& tape,
                                           const std::optional<Tensor>& mask, bool target, int64_t sinkhorn_iter,
                                           int64_t power, bool need_affinity) {
  const WalkShape d(affinity, grad, mask, sinkhorn_iter, power);
  const Tensor a = dense(affinity), g = dense(grad), saved = dense(tape);
  const auto weight = dense(mask);
  const int64_t rows = d.rows();
  d.check_tape(saved);
  Tensor grad_cam = wsss::new_empty(g, sizes_of(g)),
         grad_affinity = wsss::new_empty(a, {need_affinity ? d.batch : 0, d.n, d.n});
  for_float_type("random_walk", a, [&](auto tag) {
    using T = decltype(tag);
    if (d.still()) {
      stand_still(in<T>(g), WalkMask<T>(weight, target, 0), g.numel(), out<T>(grad_cam));
      if (grad_affinity.numel()) std::fill(out<T>(grad_affinity), out<T>(grad_affinity) + grad_affinity.numel(), T(0));
      return;
    }
    WSSS_PATH("random_walk.backward");
    for_each_matrix(d.batch, d.n, [&](int64_t b) {
      const StoredRows<T> source{in<T>(a) + b * d.n * d.n, d.n, d.n};
      const Tape t{const_cast<double*>(in<double>(saved)) + b * rows * d.n, d.n, d.classes, sinkhorn_iter, power};
      LowRank low(d.n, need_affinity ? walk_rank(d.classes, sinkhorn_iter, power) : 0);
      const int64_t at = b * d.classes * d.n;
      walk_backward(source, in<T>(g) + at, WalkMask<T>(weight, target, at), t, out<T>(grad_cam) + at,
                    need_affinity ? &low : nullptr);
      if (need_affinity) write_low_rank<T>(low, nullptr, nullptr, nullptr, out<T>(grad_affinity) + b * d.n * d.n);
    });
  });
  return {grad_cam, grad_affinity};
}

}  // namespace
}  // namespace wsss

STABLE_TORCH_LIBRARY_FRAGMENT(wsss, m) {
  m.def(
      "random_walk_fwd(Tensor affinity, Tensor cam, Tensor? mask, bool target, int sinkhorn_iter, int power) -> "
      "(Tensor, Tensor)");
  m.def(
      "random_walk_bwd(Tensor grad, Tensor affinity, Tensor tape, Tensor? mask, bool target, int sinkhorn_iter, "
      "int power, bool need_affinity) -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(wsss, CPU, m) {
  m.impl("random_walk_fwd", TORCH_BOX(&wsss::random_walk_fwd));
  m.impl("random_walk_bwd", TORCH_BOX(&wsss::random_walk_bwd));
}
