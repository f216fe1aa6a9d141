// Box masks and connected components on the GPU. A map of at most 32×32 is one warp's, as a word of bits per row; a map
// that fits into shared memory is one block's; a larger one passes through several launches.
#pragma once
#include "ops/box_mask/box_mask_math.h"
#include "ops/box_mask/components.cuh"

namespace wsss::box_mask {

// The product with 255 is one of float for half types, of double for double.
template <class T>
__device__ __forceinline__ int level_of(T x) {
  if constexpr (sizeof(T) == 8)
    return grey_level(255 * x);
  else
    return grey_level(255 * float(x));
}

// --- One warp a map, one row a lane.

// The runs of ones of `row` that hold a bit of `seeds`, whole: seeds spread by doubling distances in both directions.
__device__ __forceinline__ unsigned runs_with(unsigned row, unsigned seeds) {
  unsigned up = seeds, down = seeds, open_up = row, open_down = row;
  WSSS_UNROLL
  for (int d = 1; d < 32; d *= 2) {
    up |= open_up & (up << d);
    down |= open_down & (down >> d);
    open_up &= open_up << d;
    open_down &= open_down >> d;
  }
  return up | down;
}

// The component that holds the first pixel of `rest`, a row a lane.
__device__ __forceinline__ unsigned flood(unsigned rest, int lane) {
  const int top = __ffs(int(__ballot_sync(~0u, rest != 0))) - 1;
  unsigned found = lane == top ? rest & (~rest + 1) : 0;
  for (bool grows = true; grows;) {
    unsigned above = __shfl_up_sync(~0u, found, 1), below = __shfl_down_sync(~0u, found, 1);
    above = lane == 0 ? 0 : above;
    below = lane == kWarpThreads - 1 ? 0 : below;
    const unsigned reach = found | above | below;
    const unsigned next = runs_with(rest, rest & (reach | reach << 1 | reach >> 1));
    grows = __any_sync(~0u, next != found) != 0;
    found = next;
  }
  return found;
}

// The rows of the box mask of the foreground `rest`.
__device__ __forceinline__ unsigned boxes_of(unsigned rest, int lane) {
  unsigned cover = 0;
  while (__any_sync(~0u, rest != 0)) {
    const unsigned part = flood(rest, lane);
    const unsigned columns = __reduce_or_sync(~0u, part), rows = __ballot_sync(~0u, part != 0);
    const int left = __ffs(int(columns)) - 1, right = 31 - __clz(int(columns));
    const int top = __ffs(int(rows)) - 1, bottom = 31 - __clz(int(rows));
    if (lane >= top && lane <= bottom) cover |= (~0u << left) & (~0u >> (31 - right));
    rest &= ~part;
  }
  return cover;
}

constexpr int kWarpMaps = 4;  // maps a block

template <class T>
__global__ void __launch_bounds__(kWarpMaps* kWarpThreads)
    box_mask_warp(const T* cam, T* mask, int64_t maps, Size s, double threshold, bool clip) {
  const int lane = int(threadIdx.x) % kWarpThreads;
  const int64_t map = int64_t(blockIdx.x) * kWarpMaps + threadIdx.x / kWarpThreads;
  if (map >= maps) return;
  cam += map * s.pixels();
  mask += map * s.pixels();
  int highest = 0;
  for (int p = lane; p < s.pixels(); p += kWarpThreads) highest = max(highest, level_of(cam[p]));
  const int background = background_level(threshold, __reduce_max_sync(~0u, highest));
  unsigned foreground = 0;
  for (int y = 0; y < s.height; ++y) {
    const unsigned row = __ballot_sync(~0u, lane < s.width && level_of(cam[y * s.width + lane]) > background);
    if (lane == y) foreground = row;
  }
  const unsigned cover = boxes_of(foreground, lane);
  for (int y = 0; y < s.height; ++y) {
    const unsigned row = __shfl_sync(~0u, cover, y);
    const bool cut = clip && (y == s.height - 1 || lane == s.width - 1);
    if (lane < s.width) mask[y * s.width + lane] = T(float(!cut && (row >> lane & 1)));
  }
}

// --- Boxes of numbered components, and their union.

// Smallest row and column, and smallest negative row and column, of each component; kNowhere where nothing was added.
struct Boxes {
  static constexpr int kNowhere = 0x7f7f7f7f;  // as bytes, for cudaMemsetAsync
  int *top, *left, *minus_bottom, *minus_right;
  __host__ __device__ Boxes(int* cells, int64_t most)
      : top(cells), left(cells + most), minus_bottom(cells + 2 * most), minus_right(cells + 3 * most) {}
};

__device__ __forceinline__ void add_to_boxes(const Boxes& boxes, const int* label, Size s, Share share) {
  const int lane = int(threadIdx.x) % kWarpThreads;
  for (int64_t segment = share.first; segment < s.segments(); segment += share.step) {
    const Place at = place_of(segment, s);
    const int number = at.inside ? number_of(label, at.pixel) : 0;
    const unsigned row = __ballot_sync(~0u, number > 0);
    if (number == 0) continue;
    if (!(row << 1 >> lane & 1)) {
      atomicMin(boxes.top + number - 1, at.y);
      atomicMin(boxes.left + number - 1, at.x);
      atomicMin(boxes.minus_bottom + number - 1, -at.y);
    }
    if (!(row >> 1 >> lane & 1)) atomicMin(boxes.minus_right + number - 1, -at.x);
  }
}

// The number of boxes over a pixel is the sum of `change` over all pixels above and to the left.
__device__ __forceinline__ void add_corners(const Boxes& boxes, int box, Size s, int* change) {
  const int top = boxes.top[box], left = boxes.left[box];
  const int bottom = 1 - boxes.minus_bottom[box], right = 1 - boxes.minus_right[box];
  if (top == Boxes::kNowhere) return;
  atomicAdd(change + top * s.width + left, 1);
  if (right < s.width) atomicAdd(change + top * s.width + right, -1);
  if (bottom < s.height) atomicAdd(change + bottom * s.width + left, -1);
  if (bottom < s.height && right < s.width) atomicAdd(change + bottom * s.width + right, 1);
}

// One warp sums up a row in place.
__device__ __forceinline__ void sum_row(int* row, int width) {
  const int lane = int(threadIdx.x) % kWarpThreads;
  int carry = 0;
  for (int first = 0; first < width; first += kWarpThreads) {
    const int x = first + lane, sum = carry + warp_prefix(x < width ? row[x] : 0);
    if (x < width) row[x] = sum;
    carry = __shfl_sync(~0u, sum, kWarpThreads - 1);
  }
}

template <class T>
__device__ __forceinline__ T covered(int boxes, int y, int x, Size s, bool clip) {
  return T(float(boxes > 0 && !(clip && (y == s.height - 1 || x == s.width - 1))));
}

// --- One block a map, in shared memory.

constexpr int kBlockThreads = 256;

inline size_t components_shared_bytes(Size s) { return sizeof(int) * size_t(s.pixels()); }
inline size_t box_mask_shared_bytes(Size s) { return sizeof(int) * (size_t(s.pixels()) + 4 * size_t(s.most())); }

template <class M>
__global__ void __launch_bounds__(kBlockThreads) components_block(const M* mask, int* out, Size s, bool corners) {
  WSSS_DYNAMIC_SHARED(int, label);
  mask += int64_t(blockIdx.x) * s.pixels();
  out += int64_t(blockIdx.x) * s.pixels();
  label_in_block(label, s, corners, [&](int p) { return mask[p] != 0; });
  for (int p = int(threadIdx.x); p < s.pixels(); p += kBlockThreads) out[p] = number_of(label, p);
}

template <class T>
__global__ void __launch_bounds__(kBlockThreads)
    box_mask_block(const T* cam, T* mask, Size s, double threshold, bool clip) {
  WSSS_DYNAMIC_SHARED(int, label);
  const int pixels = s.pixels(), thread = int(threadIdx.x);
  const Boxes boxes(label + pixels, s.most());
  cam += int64_t(blockIdx.x) * pixels;
  mask += int64_t(blockIdx.x) * pixels;
  int highest = 0;
  for (int p = thread; p < pixels; p += kBlockThreads) highest = max(highest, level_of(cam[p]));
  const int background = background_level(threshold, block_max(highest));
  for (int i = thread; i < 4 * s.most(); i += kBlockThreads) boxes.top[i] = Boxes::kNowhere;
  label_in_block(label, s, true, [&](int p) { return level_of(cam[p]) > background; });
  add_to_boxes(boxes, label, s, share_of_block());
  __syncthreads();
  int* const change = label;
  for (int p = thread; p < pixels; p += kBlockThreads) change[p] = 0;
  __syncthreads();
  for (int box = thread; box < s.most(); box += kBlockThreads) add_corners(boxes, box, s, change);
  __syncthreads();
  for (int y = share_of_block().first; y < s.height; y += share_of_block().step) sum_row(change + y * s.width, s.width);
  __syncthreads();
  for (int x = thread; x < s.width; x += kBlockThreads) {
    int sum = 0;
    for (int y = 0; y < s.height; ++y)
      mask[y * s.width + x] = covered<T>(sum += change[y * s.width + x], y, x, s, clip);
  }
}

// --- Large maps: blockIdx.y is the map, its cells lie in global memory.

constexpr int kTilePixels = 1024;  // whose roots one block counts

__device__ __forceinline__ int* own_cells(int* cells, int64_t a_map) { return cells + int64_t(blockIdx.y) * a_map; }
__device__ __forceinline__ int64_t own_pixel() { return int64_t(blockIdx.x) * blockDim.x + threadIdx.x; }

template <class T>
__global__ void find_highest(const T* cam, int* highest, int pixels) {
  cam += int64_t(blockIdx.y) * pixels;
  int level = 0;
  for (int64_t p = own_pixel(); p < pixels; p += int64_t(gridDim.x) * blockDim.x) level = max(level, level_of(cam[p]));
  level = block_max(level);
  if (threadIdx.x == 0) atomicMax(highest + blockIdx.y, level);
}

template <class T>
__global__ void start_cam(const T* cam, const int* highest, int* label, Size s, double threshold) {
  cam += int64_t(blockIdx.y) * s.pixels();
  const int background = background_level(threshold, highest[blockIdx.y]);
  start_runs(own_cells(label, s.pixels()), s, share_of_grid(), [&](int p) { return level_of(cam[p]) > background; });
}

template <class M>
__global__ void start_mask(const M* mask, int* label, Size s) {
  mask += int64_t(blockIdx.y) * s.pixels();
  start_runs(own_cells(label, s.pixels()), s, share_of_grid(), [&](int p) { return mask[p] != 0; });
}

__global__ void join_maps(int* label, Size s, bool corners) {
  join_runs(own_cells(label, s.pixels()), s, share_of_grid(), corners);
}

// Points every pixel to its root; counts the roots of each tile.
__global__ void find_roots(int* label, int* counts, Size s) {
  label = own_cells(label, s.pixels());
  int found = 0;
  for (int i = int(threadIdx.x); i < kTilePixels; i += int(blockDim.x)) {
    const int64_t p = int64_t(blockIdx.x) * kTilePixels + i;
    const bool inside = p < s.pixels() && label[p] >= 0;
    const int root = inside ? root_of(label, int(p)) : -1;
    if (inside) label[p] = root;
    block_rank(inside && root == p, found);
  }
  if (threadIdx.x == 0) counts[int64_t(blockIdx.y) * gridDim.x + blockIdx.x] = found;
}

// From counts to the number of roots before each tile; one warp a map.
__global__ void sum_counts(int* counts, int tiles) {
  counts += int64_t(blockIdx.x) * tiles;
  int before = 0;
  for (int first = 0; first < tiles; first += kWarpThreads) {
    const int i = first + int(threadIdx.x), count = i < tiles ? counts[i] : 0, sum = before + warp_prefix(count);
    if (i < tiles) counts[i] = sum - count;
    before = __shfl_sync(~0u, sum, kWarpThreads - 1);
  }
}

__global__ void number_maps(int* label, const int* counts, Size s) {
  const int64_t begin = int64_t(blockIdx.x) * kTilePixels;
  const int64_t end = begin + kTilePixels < s.pixels() ? begin + kTilePixels : s.pixels();
  number_roots(own_cells(label, s.pixels()), int(begin), int(end),
               counts[int64_t(blockIdx.y) * gridDim.x + blockIdx.x]);
}

// Every pixel takes the cell of its root, which no thread writes.
__global__ void spread_numbers(int* label, int pixels) {
  label = own_cells(label, pixels);
  const int64_t p = own_pixel();
  if (p < pixels && label[p] >= 0) label[p] = label[label[p]];
}

__global__ void finish_labels(int* label, int pixels) {
  label = own_cells(label, pixels);
  const int64_t p = own_pixel();
  if (p < pixels) label[p] = ~label[p];
}

__global__ void find_boxes(const int* label, int* cells, Size s) {
  const Boxes boxes(own_cells(cells, 4 * int64_t(s.most())), s.most());
  add_to_boxes(boxes, label + int64_t(blockIdx.y) * s.pixels(), s, share_of_grid());
}

__global__ void mark_corners(int* cells, int* change, Size s) {
  const Boxes boxes(own_cells(cells, 4 * int64_t(s.most())), s.most());
  const int64_t box = own_pixel();
  if (box < s.most()) add_corners(boxes, int(box), s, own_cells(change, s.pixels()));
}

__global__ void sum_rows(int* change, Size s) {
  const Share share = share_of_grid();
  for (int64_t y = share.first; y < s.height; y += share.step)
    sum_row(own_cells(change, s.pixels()) + y * s.width, s.width);
}

// Blocks of 32 columns × kColumnGroups groups of rows: each group sums up its rows, then writes them on top of the
// sums of the groups before.
constexpr int kColumnGroups = 16;

template <class T>
__global__ void __launch_bounds__(kWarpThreads* kColumnGroups) paint(const int* change, T* mask, Size s, bool clip) {
  WSSS_SHARED(int, sums, [kColumnGroups][kWarpThreads]);
  change += int64_t(blockIdx.y) * s.pixels();
  mask += int64_t(blockIdx.y) * s.pixels();
  const int lane = int(threadIdx.x) % kWarpThreads, group = int(threadIdx.x) / kWarpThreads;
  const int x = int(blockIdx.x) * kWarpThreads + lane, rows = (s.height - 1) / kColumnGroups + 1;
  const int64_t first = int64_t(group) * rows, last = first + rows < s.height ? first + rows : s.height;
  int sum = 0;
  for (int64_t y = first; x < s.width && y < last; ++y) sum += change[y * s.width + x];
  sums[group][lane] = sum;
  __syncthreads();
  sum = 0;
  for (int g = 0; g < group; ++g) sum += sums[g][lane];
  for (int64_t y = first; x < s.width && y < last; ++y)
    mask[y * s.width + x] = covered<T>(sum += change[y * s.width + x], int(y), x, s, clip);
}

}  // namespace wsss::box_mask
