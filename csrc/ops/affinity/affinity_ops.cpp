// Schema and CPU registration of the affinities, their deviation, and the refining map.
#include <tuple>

#include "ops/affinity/refine_input.h"

namespace wsss {
namespace {

// Features …×C×N, as a stack of `batch`.
struct FeatureShape {
  int64_t batch = 1, channels, n;
  std::vector<int64_t> square;  // …×N×N
  explicit FeatureShape(const Tensor& feature) {
    const int64_t rank = feature.dim();
    WSSS_CHECK(rank >= 2, "affinity: feature must be …×C×N");
    square = sizes_of(feature);
    channels = square[size_t(rank - 2)], n = square[size_t(rank - 1)];
    square[size_t(rank - 2)] = n;
    for (int64_t i = 0; i < rank - 2; ++i) batch *= square[size_t(i)];
  }
};

// σ(scale · FᵀF), or the cosines, at least clamp_min.
Tensor affinity_fwd(const Tensor& feature, bool cosine, double scale, std::optional<double> clamp_min) {
  const FeatureShape shape(feature);
  const int64_t batch = shape.batch, channels = shape.channels, n = shape.n;
  const Tensor f = dense(feature);
  Tensor result = wsss::new_empty(f, shape.square);
  WSSS_PATH("affinity.forward");
  for_float_type("affinity", f, [&](auto tag) {
    using T = decltype(tag);
    using K = affinity::Kernels<T>;
    for (int64_t b = 0; b < batch; ++b) {
      const PackedFeatures<T> packed(in<T>(f) + b * channels * n, channels, n, cosine, false);
      T* to = out<T>(result) + b * n * n;
      for_upper_tiles<TileScratch<T>>(n,
                                      [&](int64_t i0, int64_t ni, int64_t j0, int64_t nj, int64_t, TileScratch<T>& s) {
                                        T* tile = s.encoder.data();
                                        packed.gram(i0, ni, j0, nj, tile, kTile);
                                        if (!cosine) K::sigmoid(tile, kTile, ni, nj, T(scale));
                                        if (clamp_min) K::clamp(tile, kTile, ni, nj, T(*clamp_min));
                                        K::copy(tile, kTile, ni, nj, to + i0 * n + j0, n);
                                        if (i0 != j0) K::transpose(tile, kTile, ni, nj, to + j0 * n + i0, n);
                                      });
    }
  });
  return result;
}

template <class T>
void affinity_adjoint(const PackedFeatures<T>& packed, const T* grad, const T* value, bool cosine, T scale,
                      std::optional<T> minimum, T* result) {
  using K = affinity::Kernels<T>;
  const int64_t n = packed.n;
  const StoredGradient<T> g{grad, n};
  parallel_for(0, (n + kOwned - 1) / kOwned, 1, [&](int64_t begin, int64_t end) {
    Buffer<T> weight(kTile * kOwned), other(kTile * kOwned);
    FeatureGradient<T> sum(packed);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t j0 = block * kOwned, nj = std::min(kOwned, n - j0);
      sum.clear();
      for (int64_t i0 = 0; i0 < n; i0 += kTile) {
        const int64_t ni = std::min(kTile, n - i0);
        const T* at = value + i0 * n + j0;
        g.tile(i0, ni, j0, nj, weight.data(), kOwned);
        g.turned(i0, ni, j0, nj, other.data(), kOwned);
        K::add(other.data(), kOwned, kNoMinimum<T>, ni, nj, weight.data(), kOwned);
        if (!cosine) K::sigmoid_adjoint(at, n, ni, nj, scale, weight.data(), kOwned);
        if (minimum) K::clamp_adjoint(at, n, ni, nj, *minimum, weight.data(), kOwned);
        sum.add(weight.data(), kOwned, i0, ni, nj);
      }
      sum.write(j0, nj, result);
    }
  });
}

// `affinity` is what affinity_fwd gave.
Tensor affinity_bwd(const Tensor& grad, const Tensor& affinity, const Tensor& feature, bool cosine, double scale,
                    std::optional<double> clamp_min) {
  const FeatureShape shape(feature);
  const int64_t batch = shape.batch, channels = shape.channels, n = shape.n;
  const Tensor f = dense(feature), g = dense(grad), a = dense(affinity);
  for (const Tensor* t : {&g, &a})
    WSSS_CHECK(sizes_of(*t) == shape.square && t->scalar_type() == f.scalar_type(),
               "affinity: grad and affinity must be …×N×N of the dtype of feature");
  Tensor result = wsss::new_empty(f, sizes_of(f));
  WSSS_PATH("affinity.backward");
  for_float_type("affinity", f, [&](auto tag) {
    using T = decltype(tag);
    for (int64_t b = 0; b < batch; ++b) {
      const PackedFeatures<T> packed(in<T>(f) + b * channels * n, channels, n, cosine, true);
      const std::optional<T> minimum = clamp_min ? std::optional<T>(T(*clamp_min)) : std::nullopt;
      affinity_adjoint<T>(packed, in<T>(g) + b * n * n, in<T>(a) + b * n * n, cosine, T(scale), minimum,
                          out<T>(result) + b * channels * n);
    }
  });
  return result;
}

struct DeviationShape {
  int64_t batch, layers, n;
};

DeviationShape check_deviation(const Tensor& decoder, const Tensor& encoder) {
  WSSS_CHECK(decoder.dim() == 3 && encoder.dim() == 4, "affinity_deviation: B×N×N and B×L×N×N expected");
  const DeviationShape d{encoder.size(0), encoder.size(1), encoder.size(2)};
  WSSS_CHECK(encoder.size(3) == d.n && decoder.size(0) == d.batch && decoder.size(1) == d.n && decoder.size(2) == d.n &&
                 decoder.scalar_type() == encoder.scalar_type(),
             "affinity_deviation: shapes or dtypes differ");
  return d;
}

Tensor affinity_deviation_fwd(const Tensor& decoder, const Tensor& encoder, bool is_signed) {
  const DeviationShape d = check_deviation(decoder, encoder);
  const Tensor a = dense(decoder), e = dense(encoder);
  Tensor result = wsss::new_empty(e, {d.batch, d.layers});
  constexpr int64_t kRows = 16;
  const int64_t blocks = (d.n + kRows - 1) / kRows, maps = d.batch * d.layers;
  WSSS_PATH("affinity_deviation.forward");
  for_float_type("affinity_deviation", e, [&](auto tag) {
    using T = decltype(tag);
    Buffer<double> partial(maps * blocks);
    parallel_for(0, maps * blocks, std::max<int64_t>(1, (1 << 14) / (kRows * std::max<int64_t>(d.n, 1))),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t t = begin; t < end; ++t) {
                     const int64_t map = t / blocks, i = t % blocks * kRows, rows = std::min(kRows, d.n - i);
                     partial[t] = affinity::Kernels<T>::deviation(in<T>(a) + (map / d.layers * d.n + i) * d.n, d.n,
                                                                  in<T>(e) + (map * d.n + i) * d.n, d.n, kNoMinimum<T>,
                                                                  rows, d.n, is_signed);
                   }
                 });
    for (int64_t m = 0; m < maps; ++m) {
      double sum = 0;
      for (int64_t t = m * blocks; t < (m + 1) * blocks; ++t) sum += partial[t];
      out<T>(result)[m] = T(sum);
    }
  });
  return result;
}

std::tuple<Tensor, Tensor> affinity_deviation_bwd(const Tensor& grad, const Tensor& decoder, const Tensor& encoder,
                                                  bool is_signed) {
  const DeviationShape d = check_deviation(decoder, encoder);
  const Tensor a = dense(decoder), e = dense(encoder), g = dense(grad);
  WSSS_CHECK(g.dim() == 2 && g.size(0) == d.batch && g.size(1) == d.layers && g.scalar_type() == e.scalar_type(),
             "affinity_deviation: grad must be B×L");
  Tensor to_a = wsss::new_empty(a, {d.batch, d.n, d.n}), to_e = wsss::new_empty(e, {d.batch, d.layers, d.n, d.n});
  WSSS_PATH("affinity_deviation.backward");
  for_float_type("affinity_deviation", e, [&](auto tag) {
    using T = decltype(tag);
    parallel_for(0, d.batch * d.n, 8, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const int64_t b = r / d.n, i = r % d.n;
        const T* row = in<T>(a) + r * d.n;
        T* sum = out<T>(to_a) + r * d.n;
        if (d.layers == 0) std::fill(sum, sum + d.n, T(0));
        for (int64_t l = 0; l < d.layers; ++l) {
          const int64_t at = ((b * d.layers + l) * d.n + i) * d.n;
          const T slope = in<T>(g)[b * d.layers + l];
          affinity::Kernels<T>::sign(row, d.n, in<T>(e) + at, d.n, 1, d.n, slope, is_signed, sum, d.n, l > 0);
          affinity::Kernels<T>::sign(row, d.n, in<T>(e) + at, d.n, 1, d.n, -slope, is_signed, out<T>(to_e) + at, d.n,
                                     false);
        }
      }
    });
  });
  return {to_a, to_e};
}

// (R, gate, S). Without a decoder S is NaN and every candidate is selected.
std::tuple<Tensor, Tensor, Tensor> refining_map_fwd(const std::optional<Tensor>& decoder, const Tensor& encoder,
                                                    bool maps, int64_t first_layer, bool is_signed,
                                                    std::optional<double> clamp_min) {
  const RefineTensors t("refining_map", decoder, encoder, maps, first_layer, is_signed, clamp_min);
  Tensor matrix = wsss::new_empty(encoder, {t.batch, t.n, t.n}, t.compute);
  Tensor gate = wsss::new_empty(encoder, {t.batch, t.layers}, ScalarType::Bool);
  Tensor deviation = wsss::new_empty(encoder, {t.batch, t.layers}, t.compute);
  WSSS_PATH("refining_map.forward");
  for_float_type("refining_map", matrix, [&](auto tag) {
    using T = decltype(tag);
    for (int64_t b = 0; b < t.batch; ++b) {
      const auto input = t.input<T>(b, false);
      T* to = out<T>(matrix) + b * t.n * t.n;
      Buffer<T> kept(input.worth_keeping());
      bool* chosen = choose(input, to, kept.data(), out<bool>(gate) + b * t.layers, out<T>(deviation) + b * t.layers);
      write_refined(input, chosen, static_cast<const T*>(kept.data()), to);
    }
  });
  return {matrix, gate, deviation};
}

// Gradients with respect to the decoder's features and the encoder, empty where they are not wanted.
std::tuple<Tensor, Tensor> refining_map_bwd(const Tensor& grad_matrix, const Tensor& grad_deviation,
                                            const std::optional<Tensor>& decoder, const Tensor& encoder,
                                            const Tensor& gate, bool maps, int64_t first_layer, bool is_signed,
                                            std::optional<double> clamp_min, bool need_decoder, bool need_encoder) {
  const RefineTensors t("refining_map", decoder, encoder, maps, first_layer, is_signed, clamp_min);
  const Tensor g = dense(grad_matrix), slope = dense(grad_deviation);
  const Tensor chosen = dense(gate);
  WSSS_CHECK(g.dim() == 3 && g.size(0) == t.batch && g.size(1) == t.n && g.size(2) == t.n,
             "refining_map: grad_matrix must be B×N×N");
  WSSS_CHECK(slope.dim() == 2 && slope.size(0) == t.batch && slope.size(1) == t.layers && chosen.dim() == 2 &&
                 chosen.size(0) == t.batch && chosen.size(1) == t.layers && chosen.scalar_type() == ScalarType::Bool,
             "refining_map: grad_deviation and gate must be B×L");
  auto [to_decoder, to_encoder] = t.gradients(need_decoder, need_encoder);
  WSSS_PATH("refining_map.backward");
  for_float_type("refining_map", g, [&](auto tag) {
    using T = decltype(tag);
    for (int64_t b = 0; b < t.batch; ++b) {
      const auto input = t.input<T>(b, true);
      const StoredGradient<T> source{in<T>(g) + b * t.n * t.n, t.n};
      const int64_t at = b * t.layers + first_layer;
      const RefineAdjoint<T, StoredGradient<T>> adjoint(input, source, in<bool>(chosen) + at, in<T>(slope) + at,
                                                        t.targets<T>(b, to_decoder, to_encoder));
      adjoint.run();
    }
  });
  return {to_decoder, to_encoder};
}

}  // namespace
}  // namespace wsss

STABLE_TORCH_LIBRARY_FRAGMENT(wsss, m) {
  m.def("affinity_fwd(Tensor feature, bool cosine, float scale, float? clamp_min) -> Tensor");
  m.def(
      "affinity_bwd(Tensor grad, Tensor affinity, Tensor feature, bool cosine, float scale, float? clamp_min) -> "
      "Tensor");
  m.def("affinity_deviation_fwd(Tensor decoder, Tensor encoder, bool signed) -> Tensor");
  m.def("affinity_deviation_bwd(Tensor grad, Tensor decoder, Tensor encoder, bool signed) -> (Tensor, Tensor)");
  m.def(
      "refining_map_fwd(Tensor? decoder, Tensor encoder, bool maps, int first_layer, bool signed, float? clamp_min) -> "
      "(Tensor, Tensor, "
      "Tensor)");
  m.def(
      "refining_map_bwd(Tensor grad_matrix, Tensor grad_deviation, Tensor? decoder, Tensor encoder, Tensor gate, bool "
      "maps, int "
      "first_layer, bool signed, float? clamp_min, bool need_decoder, bool need_encoder) -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(wsss, CPU, m) {
  m.impl("affinity_fwd", TORCH_BOX(&wsss::affinity_fwd));
  m.impl("affinity_bwd", TORCH_BOX(&wsss::affinity_bwd));
  m.impl("affinity_deviation_fwd", TORCH_BOX(&wsss::affinity_deviation_fwd));
  m.impl("affinity_deviation_bwd", TORCH_BOX(&wsss::affinity_deviation_bwd));
  m.impl("refining_map_fwd", TORCH_BOX(&wsss::refining_map_fwd));
  m.impl("refining_map_bwd", TORCH_BOX(&wsss::refining_map_bwd));
}
