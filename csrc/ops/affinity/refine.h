// The refining map R = A_f ∘ mean of the selected A_l, in tiles that are recomputed wherever they are needed.
#pragma once
#include <limits>
#include <optional>

#include "ops/affinity/tiles.h"

namespace wsss {

template <class T>
constexpr T kNoMinimum = -std::numeric_limits<T>::infinity();

// A tile of a matrix in memory, whose entries count as at least `minimum`.
template <class T>
struct View {
  const T* data;
  int64_t ld;
  T minimum;
};

// The candidates of one image: packed features, or maps in memory in any supported dtype with unit stride along rows.
template <class T>
struct RefineInput {
  int64_t n = 0, first = 0, layers = 0;
  bool is_signed = false;
  std::optional<T> minimum;
  std::optional<PackedFeatures<T>> decoder;
  std::vector<PackedFeatures<T>> encoder;  // from `first` on; empty where maps are given
  const void* maps = nullptr;
  ScalarType map_type{};
  int64_t layer_stride = 0, row_stride = 0;

  int64_t candidates() const { return layers - first; }
  bool symmetric() const { return !encoder.empty(); }
  bool half_maps() const { return map_type == ScalarType::Half || map_type == ScalarType::BFloat16; }
  // Values of all candidates on and above the diagonal, in tiles [tile][layer][kTile][kTile], if that is little enough
  // to keep them from the deviations to the mean; else 0. Maps are in memory anyway.
  int64_t worth_keeping() const {
    constexpr int64_t kMost = int64_t(16) << 20;
    const int64_t tiles = tile_count(n), size = tiles * (tiles + 1) / 2 * candidates() * kTile * kTile;
    return symmetric() && decoder && size <= kMost ? size : 0;
  }

  // A_l of candidate l, at least `minimum`; tiles of features are written in full panels.
  void candidate(int64_t l, int64_t i0, int64_t ni, int64_t j0, int64_t nj, T* tile, int64_t ld) const {
    using K = affinity::Kernels<T>;
    if (symmetric()) {
      encoder[size_t(l)].gram(i0, ni, j0, nj, tile, ld);
    } else {
      const int64_t at = (first + l) * layer_stride + i0 * row_stride + j0;
      if (half_maps())
        K::widen(static_cast<const uint16_t*>(maps) + at, row_stride, map_type == ScalarType::BFloat16, ni, nj, tile,
                 ld);
      else
        K::copy(static_cast<const T*>(maps) + at, row_stride, ni, nj, tile, ld);
    }
    if (minimum) K::clamp(tile, ld, ni, nj, *minimum);
  }
  // The same to be read only: a map of the sums' type in place, else made in `tile`.
  View<T> view(int64_t l, int64_t i0, int64_t ni, int64_t j0, int64_t nj, T* tile) const {
    if (!symmetric() && !half_maps())
      return {static_cast<const T*>(maps) + (first + l) * layer_stride + i0 * row_stride + j0, row_stride,
              minimum.value_or(kNoMinimum<T>)};
    candidate(l, i0, ni, j0, nj, tile, kTile);
    return {tile, kTile, kNoMinimum<T>};
  }
  void decoder_tile(int64_t i0, int64_t ni, int64_t j0, int64_t nj, T* tile, int64_t ld) const {
    decoder->gram(i0, ni, j0, nj, tile, ld);
    affinity::Kernels<T>::sigmoid(tile, ld, ni, nj, T(1));
  }
};

template <class T>
struct TileScratch {
  Buffer<T> decoder{kTile * kTile}, encoder{kTile * kTile}, other{kTile * kTile}, turned{kTile * kTile};
};

// S_l of the candidates. `stored` [n][n], if given, receives A_f, and `kept` the A_l (see worth_keeping).
template <class T>
void deviations(const RefineInput<T>& in, T* stored, T* kept, T* out) {
  using K = affinity::Kernels<T>;
  const int64_t tiles = tile_count(in.n), count = tiles * (tiles + 1) / 2, layers = in.candidates();
  Buffer<double> partial(count * layers);
  for_upper_tiles<TileScratch<T>>(
      in.n, [&](int64_t i0, int64_t ni, int64_t j0, int64_t nj, int64_t index, TileScratch<T>& s) {
        T *a = s.decoder.data(), *turned = s.turned.data();
        in.decoder_tile(i0, ni, j0, nj, a, kTile);
        if (stored) K::copy(a, kTile, ni, nj, stored + i0 * in.n + j0, in.n);
        if (i0 != j0) K::transpose(a, kTile, ni, nj, turned, kTile);
        if (stored && i0 != j0) K::copy(turned, kTile, nj, ni, stored + j0 * in.n + i0, in.n);
        for (int64_t l = 0; l < layers; ++l) {
          T* b = kept ? kept + (index * layers + l) * kTile * kTile : s.encoder.data();
          const View<T> upper = in.view(l, i0, ni, j0, nj, b);
          double sum = K::deviation(a, kTile, upper.data, upper.ld, upper.minimum, ni, nj, in.is_signed);
          if (i0 != j0 && in.symmetric()) sum *= 2;
          if (i0 != j0 && !in.symmetric()) {
            const View<T> lower = in.view(l, j0, nj, i0, ni, b);
            sum += K::deviation(turned, kTile, lower.data, lower.ld, lower.minimum, nj, ni, in.is_signed);
          }
          partial[index * layers + l] = sum;
        }
      });
  for (int64_t l = 0; l < layers; ++l) {
    double sum = 0;
    for (int64_t t = 0; t < count; ++t) sum += partial[t * layers + l];
    out[l] = T(sum);
  }
}

// The candidates whose deviation is not above the mean; rounding of the mean never rejects the smallest.
template <class T>
void select(const T* deviation, int64_t count, bool* gate) {
  double mean = 0;
  for (int64_t l = 0; l < count; ++l) mean += deviation[l];
  mean /= double(count);
  const double least = *std::min_element(deviation, deviation + count);
  for (int64_t l = 0; l < count; ++l) gate[l] = mean == mean && (deviation[l] <= mean || deviation[l] == least);
}

inline int64_t selected(const bool* gate, int64_t count) { return std::count(gate, gate + count, true); }

// sum = the mean of the selected A_l, times A_f where `a` is given. sum and scratch are tiles; `kept` holds the A_l of
// this tile, or is null.
template <class T>
void refined_tile(const RefineInput<T>& in, const bool* gate, int64_t i0, int64_t ni, int64_t j0, int64_t nj, T* sum,
                  int64_t ld, const T* a, int64_t lda, const T* kept, T* scratch) {
  using K = affinity::Kernels<T>;
  bool first = true;
  for (int64_t l = 0; l < in.candidates(); ++l) {
    if (!gate[l]) continue;
    if (first && kept)
      K::copy(kept + l * kTile * kTile, kTile, ni, nj, sum, ld);
    else if (first)
      in.candidate(l, i0, ni, j0, nj, sum, ld);
    else {
      const View<T> more =
          kept ? View<T>{kept + l * kTile * kTile, kTile, kNoMinimum<T>} : in.view(l, i0, ni, j0, nj, scratch);
      K::add(more.data, more.ld, more.minimum, ni, nj, sum, ld);
    }
    first = false;
  }
  if (first)  // no deviation compares (NaN input): 0/0, as in the equation
    for (int64_t i = 0; i < ni; ++i) std::fill(sum + i * ld, sum + i * ld + nj, T(0));
  K::mean(sum, ld, ni, nj, T(selected(gate, in.candidates())), a, lda);
}

// R; out holds A_f if there is a decoder, `kept` the A_l or is null.
template <class T>
void write_refined(const RefineInput<T>& in, const bool* gate, const T* kept, T* out) {
  using K = affinity::Kernels<T>;
  for_upper_tiles<TileScratch<T>>(
      in.n, [&](int64_t i0, int64_t ni, int64_t j0, int64_t nj, int64_t index, TileScratch<T>& s) {
        T *sum = s.encoder.data(), *upper = out + i0 * in.n + j0, *lower = out + j0 * in.n + i0;
        const T* tiles = kept ? kept + index * in.candidates() * kTile * kTile : nullptr;
        refined_tile(in, gate, i0, ni, j0, nj, sum, kTile, in.decoder ? upper : nullptr, in.n, tiles, s.other.data());
        K::copy(sum, kTile, ni, nj, upper, in.n);
        if (i0 == j0) return;
        if (in.symmetric()) {
          K::transpose(sum, kTile, ni, nj, lower, in.n);
        } else {
          refined_tile(in, gate, j0, nj, i0, ni, sum, kTile, in.decoder ? lower : nullptr, in.n,
                       static_cast<const T*>(nullptr), s.other.data());
          K::copy(sum, kTile, nj, ni, lower, in.n);
        }
      });
}

// Rows of R for passes over it, computed strip by strip.
template <class T>
struct RefinedRows {
  const RefineInput<T>& in;
  const bool* gate;
  static constexpr int64_t kRows = 64;
  struct Scratch {
    Buffer<T> rows, decoder, other;
  };
  int64_t stride() const { return tile_count(in.n) * kTile; }
  int64_t strip() const { return kRows; }
  Scratch scratch() const { return {Buffer<T>(kRows * stride()), Buffer<T>(kTile * kTile), Buffer<T>(kTile * kTile)}; }
  const T* rows(int64_t i0, int64_t ni, Scratch& s) const {
    for (int64_t j0 = 0; j0 < in.n; j0 += kTile) {
      const int64_t nj = std::min(kTile, in.n - j0);
      if (in.decoder) in.decoder_tile(i0, ni, j0, nj, s.decoder.data(), kTile);
      refined_tile(in, gate, i0, ni, j0, nj, s.rows.data() + j0, stride(), in.decoder ? s.decoder.data() : nullptr,
                   kTile, static_cast<const T*>(nullptr), s.other.data());
    }
    return s.rows.data();
  }
};

// A gradient of R in memory, read in tiles.
template <class T>
struct StoredGradient {
  const T* data;
  int64_t n;
  void tile(int64_t i0, int64_t ni, int64_t j0, int64_t nj, T* out, int64_t ld) const {
    affinity::Kernels<T>::copy(data + i0 * n + j0, n, ni, nj, out, ld);
  }
  void turned(int64_t i0, int64_t ni, int64_t j0, int64_t nj, T* out, int64_t ld) const {
    affinity::Kernels<T>::transpose(data + j0 * n + i0, n, nj, ni, out, ld);
  }
};

// A gradient of R of low rank, Σ_ρ u_ρ v_ρᵀ with vectors padded to `stride`; its terms cancel, hence float64.
template <class T>
struct LowRankGradient {
  const double *u, *v;
  int64_t rank, stride;
  void tile(int64_t i0, int64_t ni, int64_t j0, int64_t nj, T* out, int64_t ld) const {
    affinity::Kernels<T>::outer(u, v, rank, stride, i0, ni, j0, nj, out, ld);
  }
  void turned(int64_t i0, int64_t ni, int64_t j0, int64_t nj, T* out, int64_t ld) const {
    affinity::Kernels<T>::outer(v, u, rank, stride, i0, ni, j0, nj, out, ld);
  }
};

// Where the gradients of one image go; null where they are not wanted. `maps` takes [layers][n][n].
template <class T>
struct RefineGradients {
  T *decoder = nullptr, *encoder = nullptr;
};

template <class T>
struct AdjointScratch {
  // Tiles of kTile rows and kOwned columns. `direct` is (i, j), `turned` is (j, i) transposed.
  static constexpr int64_t kSize = kTile * kOwned;
  Buffer<T> g{kSize}, g_turned{kSize}, decoder{kSize}, mean{kSize}, mean_turned{kSize}, weight{kSize}, other{kSize},
      wide{kTile * kTile};
  Buffer<T> direct, turned;
  std::optional<FeatureGradient<T>> decoder_sum;
  std::vector<FeatureGradient<T>> encoder_sum;
  AdjointScratch(const RefineInput<T>& in, const RefineGradients<T>& want)
      : direct(kSize * in.candidates()), turned(in.symmetric() ? 0 : kSize * in.candidates()) {
    if (want.decoder) decoder_sum.emplace(*in.decoder);
    if (want.encoder)
      for (const auto& features : in.encoder) encoder_sum.emplace_back(features);
  }
  void clear() {
    if (decoder_sum) decoder_sum->clear();
    for (auto& sum : encoder_sum) sum.clear();
  }
};

// Adjoint of R and of the deviations; gate and the gradient of the deviations (null: 0) are those of the candidates.
template <class T, class Gradient>
class RefineAdjoint {
  using K = affinity::Kernels<T>;
  const RefineInput<T>& in;
  const Gradient& gradient;
  const bool* gate;
  const T* grad_deviation;
  RefineGradients<T> want;
  T count;

  int64_t layer_size() const { return in.n * (in.symmetric() ? in.encoder[0].channels : in.n); }
  bool matters(int64_t l) const { return gate[l] || slope(l) != 0; }
  T slope(int64_t l) const { return in.decoder && grad_deviation ? grad_deviation[l] : T(0); }

  void load(int64_t i0, int64_t ni, int64_t j0, int64_t nj, AdjointScratch<T>& s) const {
    const bool maps = !in.symmetric();
    gradient.tile(i0, ni, j0, nj, s.g.data(), kOwned);
    gradient.turned(i0, ni, j0, nj, s.g_turned.data(), kOwned);
    if (in.decoder) in.decoder_tile(i0, ni, j0, nj, s.decoder.data(), kOwned);
    std::fill(s.mean.data(), s.mean.data() + s.kSize, T(0));
    std::fill(s.mean_turned.data(), s.mean_turned.data() + s.kSize, T(0));
    for (int64_t l = 0; l < in.candidates(); ++l) {
      if (!matters(l)) continue;
      T* direct = s.direct.data() + l * s.kSize;
      in.candidate(l, i0, ni, j0, nj, direct, kOwned);
      if (gate[l]) K::add(direct, kOwned, kNoMinimum<T>, ni, nj, s.mean.data(), kOwned);
      if (!maps) continue;
      T* turned = s.turned.data() + l * s.kSize;
      in.candidate(l, j0, nj, i0, ni, s.wide.data(), kTile);
      K::transpose(s.wide.data(), kTile, nj, ni, turned, kOwned);
      if (gate[l]) K::add(turned, kOwned, kNoMinimum<T>, ni, nj, s.mean_turned.data(), kOwned);
    }
  }

  void decoder(int64_t i0, int64_t ni, int64_t nj, AdjointScratch<T>& s) const {
    const bool maps = !in.symmetric();
    T* w = s.weight.data();
    K::product(s.g.data(), s.mean.data(), kOwned, ni, nj, 1 / count, w, false);
    K::product(s.g_turned.data(), maps ? s.mean_turned.data() : s.mean.data(), kOwned, ni, nj, 1 / count, w, true);
    for (int64_t l = 0; l < in.candidates(); ++l) {
      if (slope(l) == 0) continue;
      const T *direct = s.direct.data() + l * s.kSize, *turned = maps ? s.turned.data() + l * s.kSize : direct;
      K::sign(s.decoder.data(), kOwned, direct, kOwned, ni, nj, slope(l), in.is_signed, w, kOwned, true);
      K::sign(s.decoder.data(), kOwned, turned, kOwned, ni, nj, slope(l), in.is_signed, w, kOwned, true);
    }
    K::sigmoid_adjoint(s.decoder.data(), kOwned, ni, nj, T(1), w, kOwned);
    s.decoder_sum->add(w, kOwned, i0, ni, nj);
  }

  void encoder(int64_t l, int64_t i0, int64_t ni, int64_t j0, int64_t nj, AdjointScratch<T>& s) const {
    T *w = s.weight.data(), *direct = s.direct.data() + l * s.kSize;
    const T* a = in.decoder ? s.decoder.data() : nullptr;
    const T times = in.symmetric() ? 2 : 1;  // both (i, j) and (j, i) of a Gram matrix
    if (gate[l]) {
      K::product(s.g.data(), a, kOwned, ni, nj, 1 / count, w, false);
      if (in.symmetric()) K::product(s.g_turned.data(), a, kOwned, ni, nj, 1 / count, w, true);
    }
    if (slope(l) != 0) K::sign(a, kOwned, direct, kOwned, ni, nj, -times * slope(l), in.is_signed, w, kOwned, gate[l]);
    if (in.minimum) K::clamp_adjoint(direct, kOwned, ni, nj, *in.minimum, w, kOwned);
    if (in.symmetric())
      s.encoder_sum[size_t(l)].add(w, kOwned, i0, ni, nj);
    else
      K::copy(w, kOwned, ni, nj, want.encoder + (in.first + l) * in.n * in.n + i0 * in.n + j0, in.n);
  }

  void owned(int64_t j0, int64_t nj, AdjointScratch<T>& s) const {
    s.clear();
    for (int64_t i0 = 0; i0 < in.n; i0 += kTile) {
      const int64_t ni = std::min(kTile, in.n - i0);
      load(i0, ni, j0, nj, s);
      if (want.decoder) decoder(i0, ni, nj, s);
      for (int64_t l = 0; want.encoder && l < in.candidates(); ++l)
        if (matters(l)) encoder(l, i0, ni, j0, nj, s);
    }
    if (want.decoder) s.decoder_sum->write(j0, nj, want.decoder);
    for (size_t l = 0; l < s.encoder_sum.size(); ++l)
      s.encoder_sum[l].write(j0, nj, want.encoder + (in.first + int64_t(l)) * layer_size());
  }

 public:
  RefineAdjoint(const RefineInput<T>& in, const Gradient& gradient, const bool* gate, const T* grad_deviation,
                RefineGradients<T> want)
      : in(in),
        gradient(gradient),
        gate(gate),
        grad_deviation(grad_deviation),
        want(want),
        count(T(selected(gate, in.candidates()))) {}

  void run() const {
    for (int64_t l = 0; want.encoder && l < in.layers; ++l)  // whatever is not written below
      if (l < in.first || (!in.symmetric() && !matters(l - in.first)))
        std::fill_n(want.encoder + l * layer_size(), layer_size(), T(0));
    const int64_t blocks = (in.n + kOwned - 1) / kOwned;
    parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      AdjointScratch<T> scratch(in, want);
      for (int64_t b = begin; b < end; ++b) owned(b * kOwned, std::min(kOwned, in.n - b * kOwned), scratch);
    });
  }
};

}  // namespace wsss
