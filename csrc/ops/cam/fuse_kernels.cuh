// Σ_i weight_i · (bilinear resize of map i), and the adjoint of one resize, on the GPU.
#pragma once
#include "ops/cam/fuse_math.h"
#include "wsss/cuda_block.h"

namespace wsss::cam {

constexpr int kMostMaps = 32;  // of a launch: they are its arguments

template <class T>
struct Source {
  const T* map;
  int height, width;
  double weight;
};
template <class T>
struct Sources {
  int count;
  const T* present;  // a factor for every plane, or null
  Source<T> of[kMostMaps];
};

// One thread a pixel of the result, which is written once.
template <class T, class A>
__global__ void resize_sum(Sources<T> sources, T* to, int64_t planes, int height, int width) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, pixels = int64_t(height) * width;
  if (i >= planes * pixels) return;
  const int64_t plane = i / pixels;
  const int y = int(i % pixels / width), x = int(i % width);
  A sum = 0;
  for (int k = 0; k < sources.count; ++k) {
    const Source<T>& s = sources.of[k];
    const Tap row = resize_tap(y, s.height, height), column = resize_tap(x, s.width, width);
    const T* map = s.map + plane * s.height * s.width;
    const auto along = [&](int line) {
      const A low = A(map[int64_t(line) * s.width + column.low]), high = A(map[int64_t(line) * s.width + column.high]);
      return low + A(column.t) * (high - low);
    };
    const A low = along(row.low), high = along(row.high);
    sum += A(s.weight) * (low + A(row.t) * (high - low));
  }
  to[i] = T(sources.present ? A(sources.present[plane]) * sum : sum);
}

// The cells of `to` that may read cell i of `from`.
struct Window {
  int begin, count;
};
__device__ __forceinline__ Window readers_of(int i, int from, int to) {
  if (from == 1 || to == 1) return {0, to};
  const double step = double(from - 1) / double(to - 1);
  const double begin = floor(double(i - 1) / step) - 1., end = ceil(double(i + 1) / step) + 2.;
  const int first = begin > 0. ? int(begin) : 0, last = end < double(to) ? int(end) : to;
  return {first, last - first};
}
__device__ __forceinline__ double share_of(const Tap& tap, int i) {
  return (tap.low == i ? 1. - tap.t : 0.) + (tap.high == i ? tap.t : 0.);
}

// One warp a pixel of the map: lanes share out the pixels of the result that read it.
template <class T, class A>
__global__ void resize_adjoint(const T* grad, T* to, int64_t cells, int h, int w, int height, int width, double weight,
                               const T* present) {
  const int lane = int(threadIdx.x) % kWarpThreads;
  const int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / kWarpThreads;
  if (i >= cells) return;
  const int64_t plane = i / (int64_t(h) * w);
  const int y = int(i / w % h), x = int(i % w);
  const Window rows = readers_of(y, h, height), columns = readers_of(x, w, width);
  grad += plane * height * width;
  double sum = 0;
  for (int64_t n = lane; n < int64_t(rows.count) * columns.count; n += kWarpThreads) {
    const int r = rows.begin + int(n / columns.count), c = columns.begin + int(n % columns.count);
    const double share = share_of(resize_tap(r, h, height), y) * share_of(resize_tap(c, w, width), x);
    if (share != 0.) sum += share * double(grad[int64_t(r) * width + c]);
  }
  WSSS_UNROLL
  for (int d = kWarpThreads / 2; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
  if (lane == 0) to[i] = T(A(weight * (present ? double(present[plane]) : 1.) * sum));
}

}  // namespace wsss::cam
