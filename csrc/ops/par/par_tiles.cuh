// Pixel-adaptive refinement in float for the dilations 1, 2, 4, 8, 12, 24 of the released models: the 48 neighbours of
// a tile of 32×32 pixels lie in one shared tile of 80×80 at offsets known to the compiler, and the 48 weights of a
// pixel stay in registers while the block walks over the classes. Tiles arrive by asynchronous copies, one plane ahead.
//
// Bound by shared memory: 48 reads of 4 bytes per pixel, class and iteration. Recomputing the weights costs as many
// reads as Q more classes, and less than reading 48 stored float32 weights from memory does; stored float16 weights are
// cheaper than both where few classes share them. These are predictions from counts, not measurements.
#pragma once
#include "ops/par/par_kernels.cuh"

namespace wsss::par {

constexpr int kNeighbours = 48, kHalo = 24, kTile = 32, kPitch = kTile + 2 * kHalo, kWarpSize = 32;

// A block's threads, a thread's pixels, and how many rows these are from each other.
template <int kThreads, int kPixels, int kApart>
struct Layout {
  static constexpr int threads = kThreads, pixels = kPixels, apart = kApart, rows = kThreads / kTile * kPixels;
  static constexpr int tile_rows = rows + 2 * kHalo, floats = tile_rows * kPitch;
  __device__ static int first_row(uint32_t thread) {
    const uint32_t warp = thread / kTile;
    return int(warp % kApart + warp / kApart * (kApart * kPixels));
  }
};
// The most pixels whose 48 weights fit the registers of a multiprocessor: 65536 are 8 warps of 255, four pixels a
// thread. Four rows apart, these have 41 of their 192 neighbours in common within a dilation or along the column.
using Exact = Layout<256, 4, 4>;
// Two float16 weights share a register: five pixels a thread in 168 registers, two blocks a multiprocessor.
using Stored = Layout<192, 5, 6>;
// Statistics need 48 differences and 48 logits at a time: one pixel a thread.
using Prepare = Layout<512, 1, 16>;

__host__ __device__ constexpr int released_dilation(int i) { return i < 4 ? 1 << i : 12 * (i - 3); }
__host__ __device__ constexpr int tile_offset(int k) {
  return released_dilation(k / 8) * (direction_y(k) * kPitch + direction_x(k));
}

struct TileStencil {
  int height, width, channels;
  bool vectors;  // rows of all planes begin at multiples of 16 bytes
  float factor;
  float straight[6], diagonal[6];
};

struct TilePlace {
  int y, x;  // of the tile's first pixel, without the halo
};
__device__ __forceinline__ TilePlace tile_place(int tiles_across, int rows, int origin) {
  return {int(blockIdx.x) / tiles_across * rows + origin, int(blockIdx.x) % tiles_across * kTile + origin};
}

// This thread's index, computed where it is used: what follows from it must not occupy registers beside the weights.
__device__ __forceinline__ uint32_t thread_here() {
  uint32_t thread = threadIdx.x;
  compute_here(thread);
  return thread;
}

struct Pixel {
  int y, x;
};
// The j-th pixel of this thread, and where its first lies in a tile.
template <class L>
__device__ __forceinline__ Pixel pixel_here(TilePlace place, int j) {
  const uint32_t thread = thread_here();
  return {place.y + L::first_row(thread) + j * L::apart, place.x + int(thread % kTile)};
}
template <class L>
__device__ __forceinline__ int centre_here() {
  const uint32_t thread = thread_here();
  return (L::first_row(thread) + kHalo) * kPitch + int(thread % kTile) + kHalo;
}
__device__ __forceinline__ int64_t nearest(Pixel p, const TileStencil& s) {
  return int64_t(clamped(p.y, s.height)) * s.width + clamped(p.x, s.width);
}

// Starts the copy of one plane's tile with its halo; outside the map the nearest pixel (kClamp) or 0.
template <class L, bool kClamp>
__device__ __forceinline__ void fetch_tile(float* tile, const float* plane, int row, const TileStencil& s,
                                           TilePlace place) {
  const uint32_t thread = thread_here();
  const int left = place.x - kHalo, top = place.y - kHalo;
  if (s.vectors && left >= 0 && left + kPitch <= s.width) {
    constexpr uint32_t kVectors = kPitch / 4;
    WSSS_ROLLED
    for (uint32_t c = thread; c < L::tile_rows * kVectors; c += L::threads) {
      const int y = top + int(c / kVectors), inside_y = clamped(y, s.height);
      copy_async<16>(tile + 4 * c, plane + int64_t(inside_y) * row + (left + int(c % kVectors * 4)),
                     kClamp || y == inside_y);
    }
    return;
  }
  const int lane = int(thread % kWarpSize);
  WSSS_ROLLED
  for (int i = int(thread / kWarpSize); i < L::tile_rows; i += L::threads / kWarpSize) {
    const int y = top + i, inside_y = clamped(y, s.height);
    const float* source = plane + int64_t(inside_y) * row;
    WSSS_UNROLL
    for (int j = 0; j < (kPitch + kWarpSize - 1) / kWarpSize; ++j) {
      const int column = lane + j * kWarpSize, x = left + column, inside_x = clamped(x, s.width);
      if (column < kPitch)
        copy_async<4>(tile + i * kPitch + column, source + inside_x, kClamp || (y == inside_y && x == inside_x));
    }
  }
}

// Completes the tiles of this turn while those of the next, begun before, are on their way.
__device__ __forceinline__ void tiles_ready() {
  copy_async_commit();
  copy_async_wait<1>();
  __syncthreads();
}

__device__ __forceinline__ float tile_position_weight(const TileStencil& s, int k) {
  return is_diagonal(k) ? s.diagonal[k / 8] : s.straight[k / 8];
}

// For each pixel of the thread Σ_k weight_k · value at pixel + δ_k (kSign 1) or pixel − δ_k (−1). By dilation: that
// rounds less than one long sum, and the pixels share what they read.
template <class L, int kSign>
__device__ __forceinline__ void weighted_sums(const float (&weights)[L::pixels][kNeighbours], const float* at,
                                              float (&sums)[L::pixels]) {
  WSSS_UNROLL
  for (int j = 0; j < L::pixels; ++j) sums[j] = 0.f;
  WSSS_UNROLL
  for (int i = 0; i < 6; ++i) {
    WSSS_UNROLL
    for (int j = 0; j < L::pixels; ++j) {
      float sum = 0.f;
      WSSS_UNROLL
      for (int k = 8 * i; k < 8 * i + 8; ++k)
        sum = fused(weights[j][k], at[j * L::apart * kPitch + kSign * tile_offset(k)], sum);
      sums[j] += sum;
    }
  }
}

// One channel of the pre-pass: adds its part to the logits, and returns its scale.
template <bool kPamr>
__device__ __forceinline__ float prepare_channel(float* logits, const float* centre, float factor) {
  float difference[kNeighbours], sum = 0.f, squares = 0.f;
  WSSS_UNROLL
  for (int k = 0; k < kNeighbours; ++k) {
    difference[k] = centre[tile_offset(k)] - centre[0];
    sum += difference[k];
  }
  const float mean = sum / float(samples<float>(kPamr, 6));
  WSSS_UNROLL
  for (int k = 0; k < kNeighbours; ++k) squares = fused(difference[k] - mean, difference[k] - mean, squares);
  const float scale = channel_scale(kPamr, factor, 6, squares, mean);
  WSSS_UNROLL
  for (int k = 0; k < kNeighbours; ++k) logits[k] = add_channel(kPamr, logits[k], difference[k], scale);
  return scale;
}

// Pre-pass. Statistics as in par_kernels.cuh, or (kStored) the weights: 24 planes of float16 pairs, and a plane of the
// factor that gives the rounded weights the sum of the exact ones.
template <bool kPamr, bool kStored>
__global__ void __launch_bounds__(Prepare::threads, 1)
    prepare(const float* image, float* stats, TileStencil s, int tiles_across) {
  WSSS_DYNAMIC_SHARED(float, tiles);
  const int64_t size = int64_t(s.height) * s.width;
  const TilePlace place = tile_place(tiles_across, Prepare::rows, 0);
  const int ty = int(threadIdx.x) / kTile, tx = int(threadIdx.x) % kTile, y = place.y + ty, x = place.x + tx;
  const bool inside = y < s.height && x < s.width;
  image += blockIdx.z * size * s.channels;
  stats += blockIdx.z * size * (kStored ? kNeighbours / 2 + 1 : s.channels + 2) + int64_t(y) * s.width + x;
  float logits[kNeighbours] = {};
  fetch_tile<Prepare, true>(tiles, image, s.width, s, place);
  copy_async_commit();
  for (int q = 0; q < s.channels; ++q) {
    if (q + 1 < s.channels)
      fetch_tile<Prepare, true>(tiles + (q + 1) % 2 * Prepare::floats, image + (q + 1) * size, s.width, s, place);
    tiles_ready();
    const float scale =
        prepare_channel<kPamr>(logits, tiles + q % 2 * Prepare::floats + (ty + kHalo) * kPitch + tx + kHalo, s.factor);
    if (!kStored && inside) stats[q * size] = scale;
    __syncthreads();
  }
  if (!inside) return;
  float largest = logits[0], sum = 0.f;
  WSSS_UNROLL
  for (int k = 1; k < kNeighbours; ++k) largest = fmaxf(largest, logits[k]);
  WSSS_UNROLL
  for (int i = 0; i < 6; ++i) {
    float part = 0.f;
    WSSS_UNROLL
    for (int k = 8 * i; k < 8 * i + 8; ++k) part += logits[k] = power_of_2(logits[k] - largest);
    sum += part;
  }
  if constexpr (kStored) {
    float exact = 0.f, rounded = 0.f;
    WSSS_UNROLL
    for (int k = 0; k < kNeighbours; k += 2) {
      const float low = fused(logits[k], 1.f / sum, tile_position_weight(s, k));
      const float high = fused(logits[k + 1], 1.f / sum, tile_position_weight(s, k + 1));
      const uint32_t pair = half2_bits(low, high);
      const float2 stored = half2_floats(pair);
      exact += low + high;
      rounded += stored.x + stored.y;
      stats[k / 2 * size] = __uint_as_float(pair);
    }
    stats[kNeighbours / 2 * size] = exact / rounded;
  } else {
    stats[s.channels * size] = largest;
    stats[(s.channels + 1) * size] = 1.f / sum;
  }
}

// The classes of this block: classes are shared out over blockIdx.y where the tiles alone would not fill the GPU.
struct ClassRange {
  int first, last;
};
__device__ __forceinline__ ClassRange class_range(int classes) {
  const int each = (classes + int(gridDim.y) - 1) / int(gridDim.y), first = int(blockIdx.y) * each;
  return {first, min(classes, first + each)};
}

using Weights = float[Exact::pixels][kNeighbours];

template <bool kPamr>
__device__ __forceinline__ void add_forward_channel(Weights& w, const float* colours,
                                                    const float (&scale)[Exact::pixels]) {
  WSSS_UNROLL
  for (int i = 0; i < 6; ++i) {
    WSSS_UNROLL
    for (int j = 0; j < Exact::pixels; ++j) {
      const float* own = colours + j * Exact::apart * kPitch;
      WSSS_UNROLL
      for (int k = 8 * i; k < 8 * i + 8; ++k)
        w[j][k] = add_channel(kPamr, w[j][k], own[tile_offset(k)] - own[0], scale[j]);
    }
  }
}

// One iteration with recomputed weights: the planes of the image pass through the tiles first, then those of the mask.
template <bool kPamr>
__global__ void __launch_bounds__(Exact::threads, 1)
    step_exact(const float* image, const float* stats, View<const float> from, View<float> to, TileStencil s,
               int tiles_across, int classes) {
  WSSS_DYNAMIC_SHARED(float, tiles);
  const int64_t size = int64_t(s.height) * s.width;
  const TilePlace place = tile_place(tiles_across, Exact::rows, 0);
  const ClassRange range = class_range(classes);
  const int planes = s.channels + range.last - range.first;
  image += blockIdx.z * size * s.channels;
  const float* source = from.at + blockIdx.z * from.image + range.first * from.plane;
  float* target = to.at + blockIdx.z * to.image + range.first * to.plane;
  const auto tile = [&](int n) { return tiles + (n & 1) * Exact::floats; };
  const auto fetch_channel = [&](int n) { fetch_tile<Exact, true>(tile(n), image + n * size, s.width, s, place); };
  const auto fetch_class = [&](int n) {
    if (n < planes) fetch_tile<Exact, true>(tile(n), source + (n - s.channels) * from.plane, from.row, s, place);
  };
  // Pixels beyond the map compute with the statistics of the nearest and write nothing.
  stats += blockIdx.z * size * (s.channels + 2);
  const auto own_statistic = [&](int q, int j) { return stats[q * size + nearest(pixel_here<Exact>(place, j), s)]; };

  float w[Exact::pixels][kNeighbours] = {};
  fetch_channel(0);
  copy_async_commit();
  for (int q = 0; q < s.channels; ++q) {
    q + 1 < s.channels ? fetch_channel(q + 1) : fetch_class(q + 1);
    tiles_ready();
    float scale[Exact::pixels];
    WSSS_UNROLL
    for (int j = 0; j < Exact::pixels; ++j) scale[j] = own_statistic(q, j);
    add_forward_channel<kPamr>(w, tile(q) + centre_here<Exact>(), scale);
    __syncthreads();
  }
  WSSS_UNROLL
  for (int j = 0; j < Exact::pixels; ++j) {
    const float largest = own_statistic(s.channels, j), share = own_statistic(s.channels + 1, j);
    WSSS_UNROLL
    for (int k = 0; k < kNeighbours; ++k)
      w[j][k] = fused(power_of_2(w[j][k] - largest), share, tile_position_weight(s, k));
  }
  for (int n = s.channels; n < planes; ++n) {
    fetch_class(n + 1);
    tiles_ready();
    float sums[Exact::pixels];
    weighted_sums<Exact, 1>(w, tile(n) + centre_here<Exact>(), sums);
    WSSS_UNROLL
    for (int j = 0; j < Exact::pixels; ++j) {
      const Pixel p = pixel_here<Exact>(place, j);
      if (p.y < s.height && p.x < s.width) target[(n - s.channels) * to.plane + int64_t(p.y) * to.row + p.x] = sums[j];
    }
    __syncthreads();
  }
}

// One iteration with stored weights.
__global__ void __launch_bounds__(Stored::threads, 2)
    step_stored(const float* weights, View<const float> from, View<float> to, TileStencil s, int tiles_across,
                int classes) {
  WSSS_DYNAMIC_SHARED(float, tiles);
  const int64_t size = int64_t(s.height) * s.width;
  const TilePlace place = tile_place(tiles_across, Stored::rows, 0);
  const ClassRange range = class_range(classes);
  const float* source = from.at + blockIdx.z * from.image + range.first * from.plane;
  float* target = to.at + blockIdx.z * to.image + range.first * to.plane;
  weights += blockIdx.z * size * (kNeighbours / 2 + 1);
  if (range.first < range.last) fetch_tile<Stored, true>(tiles, source, from.row, s, place);
  copy_async_commit();
  uint32_t pairs[Stored::pixels][kNeighbours / 2];
  WSSS_UNROLL
  for (int j = 0; j < Stored::pixels; ++j) {
    const float* own = weights + nearest(pixel_here<Stored>(place, j), s);
    WSSS_UNROLL
    for (int k = 0; k < kNeighbours / 2; ++k) pairs[j][k] = __float_as_uint(own[k * size]);
  }
  for (int n = 0; n < range.last - range.first; ++n) {
    if (range.first + n + 1 < range.last)
      fetch_tile<Stored, true>(tiles + (n + 1) % 2 * Stored::floats, source + (n + 1) * from.plane, from.row, s, place);
    tiles_ready();
    const float* at = tiles + n % 2 * Stored::floats + centre_here<Stored>();
    float sums[Stored::pixels] = {};
    WSSS_UNROLL
    for (int i = 0; i < 6; ++i) {
      WSSS_UNROLL
      for (int j = 0; j < Stored::pixels; ++j) {
        float sum = 0.f;
        WSSS_UNROLL
        for (int k = 8 * i; k < 8 * i + 8; k += 2) {
          compute_here(pairs[j][k / 2]);
          const float2 w = half2_floats(pairs[j][k / 2]);
          const float* other = at + j * Stored::apart * kPitch;
          sum = fused(w.y, other[tile_offset(k + 1)], fused(w.x, other[tile_offset(k)], sum));
        }
        sums[j] += sum;
      }
    }
    WSSS_UNROLL
    for (int j = 0; j < Stored::pixels; ++j) {
      const Pixel p = pixel_here<Stored>(place, j);
      if (p.y < s.height && p.x < s.width)
        target[n * to.plane + int64_t(p.y) * to.row + p.x] = sums[j] * weights[kNeighbours / 2 * size + nearest(p, s)];
    }
    __syncthreads();
  }
}

// Weights of the neighbours p − δ_k for p; their scales lie in the tile behind that of their colours.
template <bool kPamr>
__device__ __forceinline__ void add_adjoint_channel(Weights& w, const float* colours,
                                                    const float (&own)[Exact::pixels]) {
  WSSS_UNROLL
  for (int i = 0; i < 6; ++i) {
    WSSS_UNROLL
    for (int j = 0; j < Exact::pixels; ++j) {
      WSSS_UNROLL
      for (int k = 8 * i; k < 8 * i + 8; ++k) {
        const int at = j * Exact::apart * kPitch - tile_offset(k);
        w[j][k] = add_channel(kPamr, w[j][k], own[j] - colours[at], colours[Exact::floats + at]);
      }
    }
  }
}

// The largest logits lie in the tile behind that of 1 / Σ exp.
__device__ __forceinline__ void finish_adjoint_weights(Weights& w, const float* shares, const TileStencil& s) {
  WSSS_UNROLL
  for (int i = 0; i < 6; ++i) {
    WSSS_UNROLL
    for (int j = 0; j < Exact::pixels; ++j) {
      WSSS_UNROLL
      for (int k = 8 * i; k < 8 * i + 8; ++k) {
        const int at = j * Exact::apart * kPitch - tile_offset(k);
        const float exponential = power_of_2(w[j][k] - shares[Exact::floats + at]);
        w[j][k] = fused(exponential, shares[at], tile_position_weight(s, k));
      }
    }
  }
}

// One iteration of the adjoint, g(p) = Σ_k weight_k(p − δ_k) g(p − δ_k), on the map extended by the halo: what the
// forward step read outside the map it read from a border pixel, so fold_border adds it there. Weights of the pixel p −
// δ_k are recomputed from its own statistics, which pass through the tiles like the image and the gradient.
template <bool kPamr>
__global__ void __launch_bounds__(Exact::threads, 1)
    step_adjoint(const float* image, const float* stats, View<const float> from, View<float> to, TileStencil s,
                 int tiles_across, int classes) {
  WSSS_DYNAMIC_SHARED(float, tiles);
  const int64_t size = int64_t(s.height) * s.width;
  const TilePlace place = tile_place(tiles_across, Exact::rows, -kHalo);
  const ClassRange range = class_range(classes);
  const int turns = s.channels + 1 + range.last - range.first;
  image += blockIdx.z * size * s.channels;
  stats += blockIdx.z * size * (s.channels + 2);
  const float* source = from.at + blockIdx.z * from.image + range.first * from.plane;
  float* target = to.at + blockIdx.z * to.image + range.first * to.plane;
  const auto tile = [&](int n, int which) { return tiles + ((n & 1) * 2 + which) * Exact::floats; };
  const auto fetch_pair = [&](int n) {
    const float* first = n < s.channels ? image + n * size : stats + (s.channels + 1) * size;
    fetch_tile<Exact, false>(tile(n, 0), first, s.width, s, place);
    fetch_tile<Exact, false>(tile(n, 1), stats + n * size, s.width, s, place);
  };
  const auto fetch_class = [&](int n) {
    if (n < turns) fetch_tile<Exact, false>(tile(n, 0), source + (n - s.channels - 1) * from.plane, from.row, s, place);
  };

  float w[Exact::pixels][kNeighbours] = {};
  fetch_pair(0);
  copy_async_commit();
  for (int q = 0; q < s.channels; ++q) {
    fetch_pair(q + 1);
    float own[Exact::pixels];
    WSSS_UNROLL
    for (int j = 0; j < Exact::pixels; ++j) own[j] = image[q * size + nearest(pixel_here<Exact>(place, j), s)];
    tiles_ready();
    add_adjoint_channel<kPamr>(w, tile(q, 0) + centre_here<Exact>(), own);
    __syncthreads();
  }
  fetch_class(s.channels + 1);
  tiles_ready();
  finish_adjoint_weights(w, tile(s.channels, 0) + centre_here<Exact>(), s);
  __syncthreads();
  for (int n = s.channels + 1; n < turns; ++n) {
    fetch_class(n + 1);
    tiles_ready();
    float sums[Exact::pixels];
    weighted_sums<Exact, -1>(w, tile(n, 0) + centre_here<Exact>(), sums);
    WSSS_UNROLL
    for (int j = 0; j < Exact::pixels; ++j) {
      const Pixel p = pixel_here<Exact>(place, j);
      if (p.y < s.height + kHalo && p.x < s.width + kHalo)
        target[(n - s.channels - 1) * to.plane + int64_t(p.y) * to.row + p.x] = sums[j];
    }
    __syncthreads();
  }
}

__host__ __device__ inline int64_t border_pixels(int height, int width) {
  return int64_t(width) * (height > 1 ? 2 : 1) + (height > 2 ? int64_t(height - 2) * (width > 1 ? 2 : 1) : 0);
}

// Adds to each border pixel what step_adjoint left outside the map beyond it; one warp a pixel.
__global__ void fold_border(View<float> map, int height, int width) {
  const int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / kWarpSize;
  if (i >= border_pixels(height, width)) return;
  const int64_t rows = int64_t(width) * (height > 1 ? 2 : 1), columns = width > 1 ? 2 : 1;
  const int y = int(i < width ? 0 : i < rows ? height - 1 : 1 + (i - rows) / columns);
  const int x = int(i < width ? i : i < rows ? i - width : (i - rows) % columns ? width - 1 : 0);
  const int top = y == 0 ? -kHalo : y, bottom = y == height - 1 ? y + kHalo : y;
  const int left = x == 0 ? -kHalo : x, right = x == width - 1 ? x + kHalo : x;
  float* plane = map.at + blockIdx.z * map.image + blockIdx.y * map.plane;
  const int across = right - left + 1, cells = across * (bottom - top + 1), lane = int(threadIdx.x) % kWarpSize;
  float sum = 0.f;
  for (int c = lane; c < cells; c += kWarpSize) sum += plane[int64_t(top + c / across) * map.row + left + c % across];
  WSSS_UNROLL
  for (int d = kWarpSize / 2; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
  if (lane == 0) plane[int64_t(y) * map.row + x] = sum;
}

}  // namespace wsss::par
