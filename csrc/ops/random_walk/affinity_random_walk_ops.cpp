// The random walk over a refining map that is never stored: every pass recomputes its rows, strip by strip.
#include <tuple>

#include "ops/affinity/refine_input.h"
#include "ops/random_walk/walk.h"

namespace wsss {
namespace {

constexpr const char* kOp = "affinity_random_walk";

void check_cam(const Tensor& cam, const std::optional<Tensor>& mask, const RefineTensors& t, int64_t sinkhorn_iter,
               int64_t power) {
  WSSS_CHECK(cam.dim() == 4 && cam.size(0) == t.batch && cam.size(2) * cam.size(3) == t.n, kOp,
             ": cam must be B×K×h×w with h·w = N");
  WSSS_CHECK(cam.scalar_type() == t.compute, kOp, ": cam must have the computing dtype");
  check_mask(kOp, cam, mask);
  WSSS_CHECK(sinkhorn_iter >= 0 && power >= 0, kOp, ": sinkhorn_iter and power must be at least 0");
}

// (T^power (mask ⊙ cam) or mask ⊙ T^power cam, tape, gate)
std::tuple<Tensor, Tensor, Tensor> affinity_random_walk_fwd(const Tensor& cam, const std::optional<Tensor>& mask,
                                                            const std::optional<Tensor>& decoder, const Tensor& encoder,
                                                            bool maps, int64_t first_layer, bool is_signed,
                                                            std::optional<double> clamp_min, bool target,
                                                            int64_t sinkhorn_iter, int64_t power) {
  const RefineTensors t(kOp, decoder, encoder, maps, first_layer, is_signed, clamp_min);
  check_cam(cam, mask, t, sinkhorn_iter, power);
  const Tensor c = dense(cam);
  const auto weight = dense(mask);
  const int64_t classes = c.size(1), rows = tape_rows(classes, sinkhorn_iter, power), size = classes * t.n;
  Tensor result = wsss::new_empty(c, sizes_of(c)), tape = wsss::new_empty(c, {t.batch, rows, t.n}, ScalarType::Double);
  Tensor gate = wsss::new_empty(c, {t.batch, t.layers}, ScalarType::Bool);
  for_float_type(kOp, c, [&](auto tag) {
    using T = decltype(tag);
    Buffer<T> deviation(t.layers);
    for (int64_t b = 0; b < t.batch; ++b) {
      const auto input = t.input<T>(b, false);
      const bool* chosen = choose<T>(input, nullptr, nullptr, out<bool>(gate) + b * t.layers, deviation.data());
      const T* from = in<T>(c) + b * size;
      const WalkMask<T> masks(weight, target, b * size);
      if (rows == 0) {
        stand_still(from, masks, size, out<T>(result) + b * size);
        continue;
      }
      WSSS_PATH("affinity_random_walk.streaming.forward");
      const RefinedRows<T> source{input, chosen};
      walk_forward(source, from, masks, Tape{out<double>(tape) + b * rows * t.n, t.n, classes, sinkhorn_iter, power},
                   out<T>(result) + b * size);
    }
  });
  return {result, tape, gate};
}

// Gradients with respect to cam, the decoder's features and the encoder; the last two empty where they are not wanted.
std::tuple<Tensor, Tensor, Tensor> affinity_random_walk_bwd(const Tensor& grad, const std::optional<Tensor>& mask,
                                                            const std::optional<Tensor>& decoder, const Tensor& encoder,
                                                            const Tensor& tape, const Tensor& gate, bool maps,
                                                            int64_t first_layer, bool is_signed,
                                                            std::optional<double> clamp_min, bool target,
                                                            int64_t sinkhorn_iter, int64_t power, bool need_decoder,
                                                            bool need_encoder) {
  const RefineTensors t(kOp, decoder, encoder, maps, first_layer, is_signed, clamp_min);
  check_cam(grad, mask, t, sinkhorn_iter, power);
  const Tensor g = dense(grad), saved = dense(tape), chosen = dense(gate);
  const auto weight = dense(mask);
  const int64_t classes = g.size(1), rows = tape_rows(classes, sinkhorn_iter, power), size = classes * t.n;
  WSSS_CHECK(saved.dim() == 3 && saved.size(0) == t.batch && saved.size(1) == rows && saved.size(2) == t.n &&
                 saved.scalar_type() == ScalarType::Double && chosen.dim() == 2 && chosen.size(0) == t.batch &&
                 chosen.size(1) == t.layers && chosen.scalar_type() == ScalarType::Bool,
             kOp, ": tape or gate does not belong to this call");
  Tensor grad_cam = wsss::new_empty(g, sizes_of(g));
  auto [to_decoder, to_encoder] = t.gradients(need_decoder, need_encoder);
  const bool need_map = need_decoder || need_encoder;
  for_float_type(kOp, g, [&](auto tag) {
    using T = decltype(tag);
    for (int64_t b = 0; b < t.batch; ++b) {
      const auto input = t.input<T>(b, need_map);
      const bool* gates = in<bool>(chosen) + b * t.layers + first_layer;
      const WalkMask<T> masks(weight, target, b * size);
      LowRank low(t.n, rows && need_map ? walk_rank(classes, sinkhorn_iter, power) : 0);
      if (rows) {
        WSSS_PATH("affinity_random_walk.streaming.backward");
        const RefinedRows<T> source{input, gates};
        const Tape walked{const_cast<double*>(in<double>(saved)) + b * rows * t.n, t.n, classes, sinkhorn_iter, power};
        walk_backward(source, in<T>(g) + b * size, masks, walked, out<T>(grad_cam) + b * size,
                      need_map ? &low : nullptr);
      } else {
        stand_still(in<T>(g) + b * size, masks, size, out<T>(grad_cam) + b * size);
      }
      if (!need_map) continue;
      const LowRankGradient<T> source{low.u.data(), low.v.data(), low.rank, low.stride};
      RefineAdjoint<T, LowRankGradient<T>>(input, source, gates, nullptr, t.targets<T>(b, to_decoder, to_encoder))
          .run();
    }
  });
  return {grad_cam, to_decoder, to_encoder};
}

}  // namespace
}  // namespace wsss

STABLE_TORCH_LIBRARY_FRAGMENT(wsss, m) {
  m.def(
      "affinity_random_walk_fwd(Tensor cam, Tensor? mask, Tensor? decoder, Tensor encoder, bool maps, int first_layer, "
      "bool signed, float? clamp_min, bool target, int sinkhorn_iter, int power) -> (Tensor, Tensor, Tensor)");
  m.def(
      "affinity_random_walk_bwd(Tensor grad, Tensor? mask, Tensor? decoder, Tensor encoder, Tensor tape, Tensor gate, "
      "bool maps, int first_layer, bool signed, float? clamp_min, bool target, int sinkhorn_iter, int power, "
      "bool need_decoder, bool need_encoder) -> (Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(wsss, CPU, m) {
  m.impl("affinity_random_walk_fwd", TORCH_BOX(&wsss::affinity_random_walk_fwd));
  m.impl("affinity_random_walk_bwd", TORCH_BOX(&wsss::affinity_random_walk_bwd));
}
