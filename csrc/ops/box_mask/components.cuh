// Connected components by union-find in an array of one int a pixel, which may lie in shared or in global memory.
//
// While components are joined a foreground pixel holds its parent, a pixel of its component that does not come later;
// the root is the component's first pixel, whatever the order of the threads. Afterwards negative cells hold ~number.
// Work is dealt out in segments: 32 pixels of a row, one a lane, so that a run of a row starts as one tree of height 1.
#pragma once
#include "wsss/cuda_block.h"

namespace wsss::box_mask {

struct Size {
  int height, width;
  __host__ __device__ int pixels() const { return height * width; }
  __host__ __device__ int across() const { return (width - 1) / kWarpThreads + 1; }
  __host__ __device__ int segments() const { return height * across(); }
  // 8-connected components that a map can hold.
  __host__ __device__ int most() const { return ((height - 1) / 2 + 1) * ((width - 1) / 2 + 1); }
};

// A lane's pixel of a segment.
struct Place {
  int y, x, pixel;
  bool inside;
};
__device__ __forceinline__ Place place_of(int64_t segment, Size s) {
  const int y = int(segment) / s.across();
  const int x = int(segment) % s.across() * kWarpThreads + int(threadIdx.x) % kWarpThreads;
  return {y, x, y * s.width + x, x < s.width};
}

// The segments of this warp: every warp of the block, or of the grid, takes its share.
struct Share {
  int first, step;
};
__device__ __forceinline__ Share share_of_block() {
  return {int(threadIdx.x) / kWarpThreads, int(blockDim.x) / kWarpThreads};
}
__device__ __forceinline__ Share share_of_grid() {
  const int warps = int(blockDim.x) / kWarpThreads;
  return {int(blockIdx.x) * warps + int(threadIdx.x) / kWarpThreads, int(gridDim.x) * warps};
}

// A cell may change meanwhile, but only to another pixel of the component.
__device__ __forceinline__ int root_of(const int* label, int p) {
  const volatile int* cell = label;
  for (int parent; (parent = cell[p]) != p;) p = parent;
  return p;
}

__device__ __forceinline__ void unite(int* label, int a, int b) {
  while (true) {
    a = root_of(label, a);
    b = root_of(label, b);
    if (a == b) return;
    const int high = a < b ? b : a, low = a < b ? a : b;
    const int before = atomicMin(label + high, low);
    if (before == high) return;
    a = before;  // another thread gave it a parent, which must be joined too
    b = low;
  }
}

// Every pixel points to the first of its run within the segment.
template <class F>
__device__ __forceinline__ void start_runs(int* label, Size s, Share share, const F& foreground) {
  const int lane = int(threadIdx.x) % kWarpThreads;
  for (int64_t segment = share.first; segment < s.segments(); segment += share.step) {
    const Place at = place_of(segment, s);
    const bool on = at.inside && foreground(at.pixel);
    const unsigned off_before = ~__ballot_sync(~0u, on) & ((1u << lane) - 1);
    const int length = lane - (kWarpThreads - __clz(int(off_before)));
    if (at.inside) label[at.pixel] = on ? at.pixel - length : ~0;
  }
}

// Joins runs with their neighbours to the left and above. Of several contacts of two runs only the first is joined.
__device__ __forceinline__ void join_runs(int* label, Size s, Share share, bool corners) {
  const volatile int* cell = label;
  for (int64_t segment = share.first; segment < s.segments(); segment += share.step) {
    const Place at = place_of(segment, s);
    const int p = at.pixel, above = p - s.width;
    if (!at.inside || cell[p] < 0) continue;
    const bool left = at.x > 0 && cell[p - 1] >= 0;
    if (left && at.x % kWarpThreads == 0) unite(label, p, p - 1);
    if (at.y == 0) continue;
    const bool above_left = at.x > 0 && cell[above - 1] >= 0;
    if (cell[above] >= 0) {
      if (!(left && above_left)) unite(label, p, above);
    } else if (corners) {
      if (above_left && !left) unite(label, p, above - 1);
      const bool has_right = at.x + 1 < s.width;
      if (has_right && cell[above + 1] >= 0 && cell[p + 1] < 0) unite(label, p, above + 1);
    }
  }
}

// The number of a pixel's component, 0 for the background, once the roots hold theirs.
__device__ __forceinline__ int number_of(const int* label, int p) {
  const int cell = label[p];
  return cell < 0 ? ~cell : ~label[cell];
}

// Pixels [begin, end) of the roots get their numbers, counted from `numbered` + 1 in raster order. All threads of the
// block call; returns how many roots there are up to `end`.
__device__ __forceinline__ int number_roots(int* label, int begin, int end, int numbered) {
  for (int64_t first = begin; first < end; first += blockDim.x) {
    const int64_t p = first + threadIdx.x;
    const bool root = p < end && label[p] == p;
    const int rank = block_rank(root, numbered);
    if (root) label[p] = ~(rank + 1);
  }
  return numbered;
}

// All of it for a map in shared memory; afterwards number_of answers.
template <class F>
__device__ __forceinline__ void label_in_block(int* label, Size s, bool corners, const F& foreground) {
  start_runs(label, s, share_of_block(), foreground);
  __syncthreads();
  join_runs(label, s, share_of_block(), corners);
  __syncthreads();
  for (int p = int(threadIdx.x); p < s.pixels(); p += int(blockDim.x))
    if (label[p] >= 0) label[p] = root_of(label, p);
  __syncthreads();
  number_roots(label, 0, s.pixels(), 0);
  __syncthreads();
}

}  // namespace wsss::box_mask
