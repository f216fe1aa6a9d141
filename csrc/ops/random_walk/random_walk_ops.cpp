// Schema and CPU registration of the random walk over a given affinity.
#include <tuple>

#include "ops/random_walk/walk.h"

namespace wsss {
namespace {

struct WalkShape {
  int64_t batch, classes, n;
};

WalkShape check_walk(const Tensor& affinity, const Tensor& cam, const std::optional<Tensor>& mask,
                     int64_t sinkhorn_iter, int64_t power) {
  WSSS_CHECK(affinity.dim() == 3 && affinity.size(1) == affinity.size(2), "random_walk: affinity must be B×N×N");
  WSSS_CHECK(cam.dim() == 4 && cam.size(0) == affinity.size(0) && cam.size(2) * cam.size(3) == affinity.size(1),
             "random_walk: cam must be B×K×h×w with h·w = N");
  WSSS_CHECK(cam.scalar_type() == affinity.scalar_type(), "random_walk: one dtype expected");
  check_mask("random_walk", cam, mask);
  WSSS_CHECK(sinkhorn_iter >= 0 && power >= 0, "random_walk: sinkhorn_iter and power must be at least 0");
  return {cam.size(0), cam.size(1), affinity.size(1)};
}

// T^power (mask ⊙ cam), or mask ⊙ T^power cam, and the tape (B×rows×N) of which the backward pass is made.
std::tuple<Tensor, Tensor> random_walk_fwd(const Tensor& affinity, const Tensor& cam, const std::optional<Tensor>& mask,
                                           bool target, int64_t sinkhorn_iter, int64_t power) {
  const WalkShape d = check_walk(affinity, cam, mask, sinkhorn_iter, power);
  const Tensor a = dense(affinity), c = dense(cam);
  const auto weight = dense(mask);
  const bool still = power == 0 || d.classes == 0;
  const int64_t rows = still ? 0 : Tape::rows(d.classes, sinkhorn_iter, power);
  Tensor result = wsss::new_empty(c, sizes_of(c)), tape = wsss::new_empty(c, {d.batch, rows, d.n}, ScalarType::Double);
  for_float_type("random_walk", a, [&](auto tag) {
    using T = decltype(tag);
    if (still) {
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
  const WalkShape d = check_walk(affinity, grad, mask, sinkhorn_iter, power);
  const Tensor a = dense(affinity), g = dense(grad), saved = dense(tape);
  const auto weight = dense(mask);
  const bool still = power == 0 || d.classes == 0;
  const int64_t rows = still ? 0 : Tape::rows(d.classes, sinkhorn_iter, power);
  WSSS_CHECK(saved.dim() == 3 && saved.size(0) == d.batch && saved.size(1) == rows && saved.size(2) == d.n &&
                 saved.scalar_type() == ScalarType::Double,
             "random_walk: the tape does not belong to this call");
  Tensor grad_cam = wsss::new_empty(g, sizes_of(g)),
         grad_affinity = wsss::new_empty(a, {need_affinity ? d.batch : 0, d.n, d.n});
  for_float_type("random_walk", a, [&](auto tag) {
    using T = decltype(tag);
    if (still) {
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
