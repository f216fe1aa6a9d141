// Affinities in tiles: packed features, the tiles of their Gram matrices, and the gradients back to the features.
#pragma once
#include <algorithm>
#include <vector>

#include "wsss/tensor.h"

namespace wsss {
namespace affinity {
// A unit vector is inverse_j · (power_j · x_j): power is 1, or a power of two where the square or the reciprocal of the
// norm would leave the range of T. inverse is 0 for zero vectors.
template <class T>
struct Norms {
  T *inverse = nullptr, *power = nullptr;
  explicit operator bool() const { return inverse != nullptr; }
  __attribute__((always_inline)) T unit(T x, int64_t j) const { return inverse[j] * (power[j] * x); }
};

#define WSSS_CPU_KERNELS "ops/affinity/affinity_cpu.inc"
#include "wsss/cpu_kernels.h"

template <class T>
struct Kernels {
#define WSSS_AFFINITY_KERNEL(name) \
  static constexpr auto name = [](auto&&... a) { return WSSS_CPU(AffinityKernels<T>::name)(a...); }
  WSSS_AFFINITY_KERNEL(width);
  WSSS_AFFINITY_KERNEL(norms);
  WSSS_AFFINITY_KERNEL(pack_columns);
  WSSS_AFFINITY_KERNEL(pack_channels);
  WSSS_AFFINITY_KERNEL(gram);
  WSSS_AFFINITY_KERNEL(sigmoid);
  WSSS_AFFINITY_KERNEL(clamp);
  WSSS_AFFINITY_KERNEL(transpose);
  WSSS_AFFINITY_KERNEL(copy);
  WSSS_AFFINITY_KERNEL(widen);
  WSSS_AFFINITY_KERNEL(add);
  WSSS_AFFINITY_KERNEL(mean);
  WSSS_AFFINITY_KERNEL(deviation);
  WSSS_AFFINITY_KERNEL(sign);
  WSSS_AFFINITY_KERNEL(product);
  WSSS_AFFINITY_KERNEL(sigmoid_adjoint);
  WSSS_AFFINITY_KERNEL(clamp_adjoint);
  WSSS_AFFINITY_KERNEL(gram_adjoint);
  WSSS_AFFINITY_KERNEL(feature_gradient);
  WSSS_AFFINITY_KERNEL(outer);
#undef WSSS_AFFINITY_KERNEL
};
}  // namespace affinity

constexpr int64_t kTile = 128;
constexpr int64_t kOwned = 32;  // columns whose gradient one work item owns

inline int64_t tile_count(int64_t n) { return (n + kTile - 1) / kTile; }

// body(i0, ni, j0, nj, index) for the tiles on and above the diagonal, by all threads.
template <class Scratch, class F>
void for_upper_tiles(int64_t n, const F& body) {
  const int64_t tiles = tile_count(n), count = tiles * (tiles + 1) / 2;
  parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    int64_t row = 0, before = 0;
    for (int64_t index = begin; index < end; ++index) {
      while (index >= before + tiles - row) before += tiles - row++;
      const int64_t i0 = row * kTile, j0 = (row + index - before) * kTile;
      body(i0, std::min(kTile, n - i0), j0, std::min(kTile, n - j0), index, scratch);
    }
  });
}

// Features C×N in the two orders in which the products read them, normalised if they are for cosines.
template <class T>
struct PackedFeatures {
  const T* source = nullptr;
  int64_t channels = 0, n = 0;
  bool unit = false;
  Buffer<T> scales, columns, by_channel;

  PackedFeatures() = default;
  PackedFeatures(const T* x, int64_t channels, int64_t n, bool unit, bool backward)
      : source(x), channels(channels), n(n), unit(unit) {
    using K = affinity::Kernels<T>;
    const int64_t w = K::width(), panels = (n + w - 1) / w;
    if (unit) {
      scales = Buffer<T>(2 * n);
      parallel_for(0, (n + 63) / 64, 4, [&](int64_t begin, int64_t end) {
        K::norms(x, channels, n, begin * 64, std::min(n, end * 64), norms());
      });
    }
    columns = Buffer<T>(panels * channels * w);
    parallel_for(0, panels, 4, [&](int64_t begin, int64_t end) {
      K::pack_columns(x, channels, n, norms(), begin, end, columns.data());
    });
    if (!backward) return;
    by_channel = Buffer<T>(channel_panels() * n * w);
    parallel_for(0, channel_panels(), 4, [&](int64_t begin, int64_t end) {
      K::pack_channels(x, channels, n, norms(), begin, end, by_channel.data());
    });
  }
  affinity::Norms<T> norms() const {
    T* data = const_cast<T*>(scales.data());
    return unit ? affinity::Norms<T>{data, data + n} : affinity::Norms<T>{};
  }
  int64_t channel_panels() const {
    return (channels + affinity::Kernels<T>::width() - 1) / affinity::Kernels<T>::width();
  }
  int64_t gradient_stride() const { return channel_panels() * affinity::Kernels<T>::width(); }
  void gram(int64_t i0, int64_t ni, int64_t j0, int64_t nj, T* tile, int64_t ld) const {
    affinity::Kernels<T>::gram(columns.data(), channels, i0, ni, j0, nj, tile, ld);
  }
};

// The gradient of the features of kOwned columns, summed tile by tile in the order of the rows.
template <class T>
struct FeatureGradient {
  const PackedFeatures<T>* features;
  Buffer<T> sum;
  explicit FeatureGradient(const PackedFeatures<T>& f) : features(&f), sum(kOwned * f.gradient_stride()) {}
  void clear() { std::fill(sum.data(), sum.data() + sum.size(), T(0)); }
  void add(const T* g, int64_t ld, int64_t i0, int64_t ni, int64_t nj) {
    affinity::Kernels<T>::gram_adjoint(g, ld, features->by_channel.data(), features->channel_panels(), features->n, i0,
                                       ni, nj, sum.data(), features->gradient_stride());
  }
  void write(int64_t j0, int64_t nj, T* out) const {
    affinity::Kernels<T>::feature_gradient(sum.data(), features->gradient_stride(), features->source,
                                           features->channels, features->n, features->norms(), j0, nj, out);
  }
};

}  // namespace wsss
