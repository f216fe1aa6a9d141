// Min–max normalisation of rectified maps, and its gradient, on the GPU. A small map is one block's in one launch; a
// larger one is cut into tiles, whose extrema and sums later launches read in their order. Divisions, not reciprocals,
// so that the result has the bits of the reference.
#pragma once
#include "wsss/cuda_block.h"

namespace wsss::cam {

constexpr int kThreads = 256;
constexpr int64_t kTilePixels = 4096;

template <class A>
__device__ __forceinline__ A rectified(A x) {
  return x <= A(0) ? A(0) : x;  // NaN stays
}

// The pixels of a block: those of its tile of its map.
struct Tile {
  int64_t map, first, begin, end;  // first: the tile's place among all tiles, of which its map has `tiles`

  __device__ Tile(int64_t pixels, int64_t tiles)
      : map(blockIdx.x / tiles), first(map * tiles), begin(blockIdx.x % tiles * kTilePixels) {
    end = tiles == 1 || begin + kTilePixels > pixels ? pixels : begin + kTilePixels;
  }
};

template <class F>
__device__ __forceinline__ void for_each(int64_t begin, int64_t end, const F& body) {
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) body(i);
}

// Both NaN where there is a NaN.
template <class A>
struct Extrema {
  A low, high;
};

// value(i) for i from begin to end: each thread's own, then the block's.
template <class A, class F>
__device__ Extrema<A> extrema_of(int64_t begin, int64_t end, const F& value) {
  const Extrema<A> first = value(begin);
  A low = first.low, high = first.high;
  bool sick = false;
  for_each(begin, end, [&](int64_t i) {
    const Extrema<A> v = value(i);
    low = v.low < low ? v.low : low;
    high = v.high > high ? v.high : high;
    sick |= v.low != v.low;
  });
  const bool any = __syncthreads_or(sick);
  low = block_min(low);
  high = block_max(high);
  const A nan = A(__uint_as_float(0x7fffffff));
  return {any ? nan : low, any ? nan : high};
}
template <class T, class A>
__device__ Extrema<A> extrema_of_map(const T* cam, const Tile& tile) {
  return extrema_of<A>(tile.begin, tile.end, [&](int64_t i) {
    const A x = rectified(A(cam[i]));
    return Extrema<A>{x, x};
  });
}
template <class A>
__device__ Extrema<A> extrema_of_tiles(const Extrema<A>* parts, const Tile& tile, int64_t tiles) {
  return extrema_of<A>(0, tiles, [&](int64_t i) { return parts[tile.first + i]; });
}

// What differences are divided by, and whether that is their range.
template <class A>
struct Range {
  A low, high, divisor;
  bool constant, clamped;

  __device__ Range(const Extrema<A>& e, A eps) : low(e.low), high(e.high) {
    const A range = high - low;
    divisor = range <= eps ? eps : range;
    constant = range == A(0);
    clamped = range <= eps;
  }
  __device__ A normalized(A x) const { return (rectified(x) - low) / divisor; }
};

// What the gradient needs to know of a map, or of a part of it: sums in double, first pixels of the extrema.
struct Sums {
  double plain, weighted;  // Σ grad, Σ grad·y
  int64_t lowest, highest;
};
constexpr int64_t kNowhere = INT64_MAX;

template <class F>
__device__ Sums sums_of(int64_t begin, int64_t end, const F& value) {
  Sums s{0., 0., kNowhere, kNowhere};
  for_each(begin, end, [&](int64_t i) {
    const Sums v = value(i);
    s.plain += v.plain;
    s.weighted += v.weighted;
    s.lowest = v.lowest < s.lowest ? v.lowest : s.lowest;
    s.highest = v.highest < s.highest ? v.highest : s.highest;
  });
  s.plain = block_sum(s.plain);
  s.weighted = block_sum(s.weighted);
  s.lowest = block_min(s.lowest);
  s.highest = block_min(s.highest);
  return s;
}
template <class T, class A>
__device__ Sums sums_of_map(const T* grad, const T* cam, const Tile& tile, const Range<A>& range) {
  return sums_of(tile.begin, tile.end, [&](int64_t i) {
    const A x = A(cam[i]);
    const double g = double(grad[i]);
    // a minimum of 0 is cut off by the rectifier
    return Sums{g, g * double(range.normalized(x)), range.low > A(0) && x == range.low ? i : kNowhere,
                x == range.high ? i : kNowhere};
  });
}

// y = (x − low) / divisor. Beside the direct path, low and (where it is not clamped) the divisor pass their gradients
// to the first pixel that has the least and the greatest value. A constant map and what the rectifier cut off get 0.
template <class T, class A>
__device__ void write_gradient(const T* grad, const T* cam, const Tile& tile, const Range<A>& range, const Sums& s,
                               T* to) {
  const double divisor = double(range.divisor);
  const double to_range = range.clamped ? 0. : -s.weighted / divisor, to_low = -s.plain / divisor - to_range;
  for_each(tile.begin, tile.end, [&](int64_t i) {
    A value = A(cam[i]) <= A(0) ? A(0) : A(grad[i]) / range.divisor;
    if (i == s.highest) value = A(double(grad[i]) / divisor + to_range);
    if (i == s.lowest) value = A(double(grad[i]) / divisor + to_low);
    to[i] = range.constant ? T(A(0)) : T(value);
  });
}

template <class T, class A>
__device__ void write_normalized(const T* cam, const Tile& tile, const Range<A>& range, T* to) {
  for_each(tile.begin, tile.end, [&](int64_t i) { to[i] = T(range.normalized(A(cam[i]))); });
}

template <class T, class A>
__global__ void __launch_bounds__(kThreads, 1) normalize_block(const T* cam, T* to, int64_t pixels, A eps) {
  const Tile tile(pixels, 1);
  cam += tile.map * pixels;
  write_normalized(cam, tile, Range<A>(extrema_of_map<T, A>(cam, tile), eps), to + tile.map * pixels);
}

template <class T, class A>
__global__ void __launch_bounds__(kThreads, 1)
    normalize_grad_block(const T* grad, const T* cam, T* to, int64_t pixels, A eps) {
  const Tile tile(pixels, 1);
  cam += tile.map * pixels;
  grad += tile.map * pixels;
  const Range<A> range(extrema_of_map<T, A>(cam, tile), eps);
  write_gradient(grad, cam, tile, range, sums_of_map(grad, cam, tile, range), to + tile.map * pixels);
}

// --- In tiles.

template <class T, class A>
__global__ void __launch_bounds__(kThreads, 1)
    find_extrema(const T* cam, Extrema<A>* parts, int64_t pixels, int64_t tiles) {
  const Tile tile(pixels, tiles);
  const Extrema<A> found = extrema_of_map<T, A>(cam + tile.map * pixels, tile);
  if (threadIdx.x == 0) parts[blockIdx.x] = found;
}

template <class T, class A>
__global__ void __launch_bounds__(kThreads, 1)
    normalize_tile(const T* cam, const Extrema<A>* parts, T* to, int64_t pixels, int64_t tiles, A eps) {
  const Tile tile(pixels, tiles);
  const Range<A> range(extrema_of_tiles(parts, tile, tiles), eps);
  write_normalized(cam + tile.map * pixels, tile, range, to + tile.map * pixels);
}

template <class T, class A>
__global__ void __launch_bounds__(kThreads, 1)
    sum_tile(const T* grad, const T* cam, const Extrema<A>* parts, Sums* sums, int64_t pixels, int64_t tiles, A eps) {
  const Tile tile(pixels, tiles);
  const Range<A> range(extrema_of_tiles(parts, tile, tiles), eps);
  const Sums found = sums_of_map(grad + tile.map * pixels, cam + tile.map * pixels, tile, range);
  if (threadIdx.x == 0) sums[blockIdx.x] = found;
}

template <class T, class A>
__global__ void __launch_bounds__(kThreads, 1)
    normalize_grad_tile(const T* grad, const T* cam, const Extrema<A>* parts, const Sums* sums, T* to, int64_t pixels,
                        int64_t tiles, A eps) {
  const Tile tile(pixels, tiles);
  const Range<A> range(extrema_of_tiles(parts, tile, tiles), eps);
  const Sums all = sums_of(0, tiles, [&](int64_t i) { return sums[tile.first + i]; });
  write_gradient(grad + tile.map * pixels, cam + tile.map * pixels, tile, range, all, to + tile.map * pixels);
}

}  // namespace wsss::cam
