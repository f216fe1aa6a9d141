// Pixel-adaptive refinement on the GPU, for any dilations, in float and double. par_tiles.cuh holds the faster kernels
// for the dilations of the released models.
//
// Weights are not stored here: softmax_k(logit_k) is recomputed from the statistics of its pixel, planes [Q + 2][H·W]
// of the logit's scale per channel, the largest logit, and 1 / Σ exp. Logits are in units of log 2. Neighbours are
// numbered k = 8·dilation + direction, directions row-major without the centre. Sums run in that order, first within a
// dilation.
#pragma once
#include "wsss/cuda.h"

namespace wsss::par {

constexpr int kMaxDilations = 192;  // the table below is a kernel argument, of which there may be 4 KB

// The neighbours, and how colours become weights.
template <class A>
struct Stencil {
  int height, width, channels, count;
  bool pamr;
  A factor;  // "par": sqrt(log2(e) / Q) / w1; "pamr": log2(e) / Q
  int dilation[kMaxDilations];
  A straight[kMaxDilations], diagonal[kMaxDilations];  // w3 · softmax of the position term
};

// A stack of planes inside a larger buffer; `at` is pixel (0, 0) of the first plane of the first image.
template <class T>
struct View {
  T* at;
  int row;
  int64_t plane, image;
};

__host__ __device__ constexpr int direction_y(int k) { return (k % 8 + (k % 8 > 3)) / 3 - 1; }
__host__ __device__ constexpr int direction_x(int k) { return (k % 8 + (k % 8 > 3)) % 3 - 1; }
__host__ __device__ constexpr bool is_diagonal(int k) { return direction_y(k) != 0 && direction_x(k) != 0; }

__device__ __forceinline__ int clamped(int v, int size) { return v < 0 ? 0 : v >= size ? size - 1 : v; }
__device__ __forceinline__ float fused(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double fused(double a, double b, double c) { return fma(a, b, c); }
__device__ __forceinline__ float magnitude(float x) { return fabsf(x); }
__device__ __forceinline__ double magnitude(double x) { return fabs(x); }
__device__ __forceinline__ float root(float x) { return sqrtf(x); }
__device__ __forceinline__ double root(double x) { return sqrt(x); }
__device__ __forceinline__ float power_of_2(float x) { return exp2_fast(x); }
__device__ __forceinline__ double power_of_2(double x) { return exp2(x); }

// The difference is taken before it is scaled: where colours are equal it must be exactly 0, since the scale may be
// 1e8.
template <class A>
__device__ __forceinline__ A add_channel(bool pamr, A logit, A difference, A scale) {
  if (pamr) return fused(-magnitude(difference), scale, logit);
  const A scaled = difference * scale;
  return fused(-scaled, scaled, logit);
}

// squares: Σ (difference − mean)² over the neighbours. PAMR's window also holds the centre, once per dilation.
template <class A>
__device__ __forceinline__ A channel_scale(bool pamr, A factor, int dilations, A squares, A mean) {
  if (!pamr) return factor / (root(squares / A(8 * dilations - 1)) + A(1e-8));
  return factor / (A(1e-8) + A(0.1) * root((squares + A(dilations) * mean * mean) / A(9 * dilations - 1)));
}

template <class A>
__device__ __forceinline__ int samples(bool pamr, int dilations) {
  return (pamr ? 9 : 8) * dilations;
}

template <class A>
__device__ __forceinline__ A position_weight(const Stencil<A>& s, int k) {
  return is_diagonal(k) ? s.diagonal[k / 8] : s.straight[k / 8];
}

template <class From, class To>
__global__ void convert(View<const From> from, View<To> to, int height, int width) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= int64_t(height) * width) return;
  const int y = int(i / width), x = int(i % width);
  to.at[blockIdx.z * to.image + blockIdx.y * to.plane + int64_t(y) * to.row + x] =
      To(from.at[blockIdx.z * from.image + blockIdx.y * from.plane + int64_t(y) * from.row + x]);
}

template <class A>
__device__ A logit(const Stencil<A>& s, const A* image, const A* scales, int64_t size, int64_t centre, int64_t other) {
  A sum = 0;
  for (int q = 0; q < s.channels; ++q)
    sum = add_channel(s.pamr, sum, image[q * size + other] - image[q * size + centre], scales[q * size + centre]);
  return sum;
}

template <class A>
__device__ __forceinline__ int64_t neighbour(const Stencil<A>& s, int y, int x, int k) {
  const int d = s.dilation[k / 8];
  return int64_t(clamped(y + d * direction_y(k), s.height)) * s.width + clamped(x + d * direction_x(k), s.width);
}

template <class A>
__global__ void statistics(const A* image, A* stats, Stencil<A> s) {
  const int64_t size = int64_t(s.height) * s.width, p = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (p >= size) return;
  const int y = int(p / s.width), x = int(p % s.width), count = 8 * s.count;
  image += blockIdx.y * size * s.channels;
  stats += blockIdx.y * size * (s.channels + 2);
  for (int q = 0; q < s.channels; ++q) {
    const A* plane = image + q * size;
    A sum = 0, squares = 0;
    for (int k = 0; k < count; ++k) sum += plane[neighbour(s, y, x, k)] - plane[p];
    const A mean = sum / A(samples<A>(s.pamr, s.count));
    for (int k = 0; k < count; ++k) {
      const A centred = plane[neighbour(s, y, x, k)] - plane[p] - mean;
      squares = fused(centred, centred, squares);
    }
    stats[q * size + p] = channel_scale(s.pamr, s.factor, s.count, squares, mean);
  }
  A largest = logit(s, image, stats, size, p, neighbour(s, y, x, 0)), sum = 0;
  for (int k = 1; k < count; ++k) largest = max(largest, logit(s, image, stats, size, p, neighbour(s, y, x, k)));
  for (int i = 0; i < s.count; ++i) {
    A part = 0;
    for (int k = 8 * i; k < 8 * i + 8; ++k)
      part += power_of_2(logit(s, image, stats, size, p, neighbour(s, y, x, k)) - largest);
    sum += part;
  }
  stats[s.channels * size + p] = largest;
  stats[(s.channels + 1) * size + p] = A(1) / sum;
}

template <class A>
__device__ __forceinline__ A weight(const Stencil<A>& s, const A* image, const A* stats, int64_t size, int64_t centre,
                                    int64_t other, int k) {
  const A shifted = logit(s, image, stats, size, centre, other) - stats[s.channels * size + centre];
  return fused(power_of_2(shifted), stats[(s.channels + 1) * size + centre], position_weight(s, k));
}

constexpr int kClassesPerThread = 4;  // share a recomputed weight

template <class A>
__device__ __forceinline__ void end_dilation(A* total, A* sum) {
  WSSS_UNROLL
  for (int c = 0; c < kClassesPerThread; ++c) {
    total[c] += sum[c];
    sum[c] = 0;
  }
}

// Positions along one axis.
struct Range {
  int first, last;
};
// The positions q with clamp(q + shift) = p.
__device__ __forceinline__ Range sources(int p, int shift, int size) {
  if (shift > 0)
    return p < size - 1 ? Range{p - shift, p - shift >= 0 ? p - shift : p - shift - 1}
                        : Range{max(0, size - 1 - shift), size - 1};
  if (shift < 0) return p > 0 ? Range{p - shift, min(p - shift, size - 1)} : Range{0, min(size - 1, -shift)};
  return {p, p};
}
// What a step reads for p: its neighbour, or in the adjoint all whose neighbour it is.
template <bool kTransposed>
__device__ __forceinline__ Range partners(int p, int shift, int size) {
  if (kTransposed) return sources(p, shift, size);
  const int other = clamped(p + shift, size);
  return {other, other};
}

// One iteration, or (kTransposed) its adjoint, where a weight is that of the pixel it is read from.
template <class A, bool kTransposed>
__global__ void step(const A* image, const A* stats, View<const A> from, View<A> to, Stencil<A> s, int classes) {
  const int64_t size = int64_t(s.height) * s.width, p = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (p >= size) return;
  const int y = int(p / s.width), x = int(p % s.width), first = int(blockIdx.y) * kClassesPerThread;
  image += blockIdx.z * size * s.channels;
  stats += blockIdx.z * size * (s.channels + 2);
  const A* source = from.at + blockIdx.z * from.image + first * from.plane;
  A* target = to.at + blockIdx.z * to.image + first * to.plane;
  A total[kClassesPerThread] = {}, sum[kClassesPerThread] = {};
  for (int k = 0; k < 8 * s.count; ++k) {
    const int d = s.dilation[k / 8];
    const Range rows = partners<kTransposed>(y, d * direction_y(k), s.height),
                columns = partners<kTransposed>(x, d * direction_x(k), s.width);
    for (int i = rows.first; i <= rows.last; ++i)
      for (int j = columns.first; j <= columns.last; ++j) {
        const int64_t q = int64_t(i) * s.width + j;
        const A w = kTransposed ? weight(s, image, stats, size, q, p, k) : weight(s, image, stats, size, p, q, k);
        WSSS_UNROLL
        for (int c = 0; c < kClassesPerThread; ++c)
          if (first + c < classes) sum[c] = fused(w, source[c * from.plane + q], sum[c]);
      }
    if (k % 8 == 7) end_dilation(total, sum);
  }
  WSSS_UNROLL
  for (int c = 0; c < kClassesPerThread; ++c)
    if (first + c < classes) target[c * to.plane + p] = total[c];
}

}  // namespace wsss::par
