// Lloyd's algorithm on the GPU. A set of few points is one block's from start to end; the points of a larger one are
// cut into shares, one block each, whose sums a second launch adds up in order. Convergence is known to the device
// alone: a set that has converged is skipped by what was launched for it.
#pragma once
#include "wsss/cuda_block.h"

namespace wsss::kmeans {

constexpr int kThreads = 512;
constexpr int kFew = 4;       // clusters whose sums a thread keeps in registers
constexpr int kTogether = 4;  // centroids that share one reading of a point

struct Shape {
  int64_t count, depth, share, shares;
  int k;
  // Threads in groups of `columns`, one a coordinate; each group sums up its own points. No group: sums lie in global
  // memory, and there is one.
  int columns, groups;
  bool near_centroids;  // they fit into shared memory

  __host__ __device__ int64_t cells() const { return k * depth; }
  __host__ __device__ size_t sums_bytes() const { return size_t(groups) * size_t(cells()) * sizeof(double); }
  __host__ __device__ size_t shared_bytes(size_t cell) const {
    return sums_bytes() + (near_centroids ? size_t(cells()) * cell : 0) + size_t(groups) * size_t(k) * sizeof(int);
  }
};

// Where a block adds up: [groups][k][depth] and [groups][k].
struct Sums {
  double* sum;
  int* count;
  int groups;
};

// The block's shared memory.
template <class A>
struct Workspace {
  Sums sums;
  A* centroid;

  __device__ Workspace(unsigned char* shared, const Shape& s) {
    sums.sum = reinterpret_cast<double*>(shared);
    centroid = reinterpret_cast<A*>(shared + s.sums_bytes());
    sums.count = reinterpret_cast<int*>(centroid + (s.near_centroids ? s.cells() : 0));
    sums.groups = s.groups;
  }
};

template <class F>
__device__ __forceinline__ void for_each(int64_t n, const F& body) {
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) body(i);
}

// The nearest centroid of a point; the first of several.
template <class T, class A>
__device__ __forceinline__ int nearest(const T* point, const A* centroid, const Shape& s) {
  A best = 0;
  int index = 0;
  for (int first = 0; first < s.k; first += kTogether) {
    A distance[kTogether] = {};
    for (int64_t c = 0; c < s.depth; ++c) {
      const A x = A(point[c]);
      WSSS_UNROLL
      for (int j = 0; j < kTogether; ++j) {
        const A away = x - centroid[int64_t(min(first + j, s.k - 1)) * s.depth + c];
        distance[j] += away * away;
      }
    }
    WSSS_UNROLL
    for (int j = 0; j < kTogether; ++j) {  // beyond the last centroid it comes again, and is no nearer
      const bool better = first + j == 0 || distance[j] < best;
      index = better ? min(first + j, s.k - 1) : index;
      best = better ? distance[j] : best;
    }
  }
  return index;
}

template <class T, class A>
__device__ void assign(const T* x, const A* centroid, int64_t* label, int64_t begin, int64_t end, const Shape& s) {
  for_each(end - begin, [&](int64_t i) { label[begin + i] = nearest(x + (begin + i) * s.depth, centroid, s); });
  __syncthreads();
}

// Every group adds its points, every thread one coordinate of them: each cell has one owner.
template <class T>
__device__ void add_points(const T* x, const int64_t* label, int64_t begin, int64_t end, const Sums& to,
                           const Shape& s) {
  const int group = int(threadIdx.x) / s.columns;
  for_each(to.groups * s.cells(), [&](int64_t i) { to.sum[i] = 0.; });
  for_each(int64_t(to.groups) * s.k, [&](int64_t i) { to.count[i] = 0; });
  __syncthreads();
  for (int64_t c = int(threadIdx.x) % s.columns; group < to.groups && c < s.depth; c += s.columns) {
    double* const sum = to.sum + group * s.cells() + c;
    int* const count = to.count + int64_t(group) * s.k;
    if (s.k <= kFew) {
      double few[kFew] = {};
      int sizes[kFew] = {};
      for (int64_t p = begin + group; p < end; p += to.groups) {
        const double value = double(x[p * s.depth + c]);
        const int own = int(label[p]);
        WSSS_UNROLL
        for (int a = 0; a < kFew; ++a) {
          few[a] += own == a ? value : 0.;
          sizes[a] += own == a;
        }
      }
      WSSS_UNROLL
      for (int a = 0; a < kFew; ++a) {
        if (a >= s.k) continue;
        sum[a * s.depth] = few[a];
        if (c == 0) count[a] = sizes[a];
      }
      continue;
    }
    for (int64_t p = begin + group; p < end; p += to.groups) {
      sum[label[p] * s.depth] += double(x[p * s.depth + c]);
      if (c == 0) ++count[label[p]];
    }
  }
  __syncthreads();
}

// Moves the centroids to the means of their points, of which `from` holds the sums in parts. Returns the longest way.
template <class A>
__device__ double move_centroids(const Sums& from, A* centroid, const Shape& s) {
  const int lane = int(threadIdx.x) % kWarpThreads, warps = int(blockDim.x) / kWarpThreads;
  double longest = 0;
  for (int a = int(threadIdx.x) / kWarpThreads; a < s.k; a += warps) {
    int64_t size = 0;
    for (int g = 0; g < from.groups; ++g) size += from.count[int64_t(g) * s.k + a];
    double moved = 0;
    for (int64_t c = lane; size > 0 && c < s.depth; c += kWarpThreads) {
      double sum = 0;
      for (int g = 0; g < from.groups; ++g) sum += from.sum[g * s.cells() + a * s.depth + c];
      A& at = centroid[a * s.depth + c];
      const A next = A(sum / double(size));
      moved += (double(next) - double(at)) * (double(next) - double(at));
      at = next;
    }
    WSSS_UNROLL
    for (int d = kWarpThreads / 2; d > 0; d /= 2) moved += __shfl_xor_sync(~0u, moved, d);
    longest = max(longest, sqrt(moved));
  }
  return block_max(longest);
}

// A set of points in one block, from the first centroids to the labels.
template <class T, class A>
__global__ void __launch_bounds__(kThreads, 1)
    lloyd_block(const T* x, const T* start, int64_t* label, T* centroid, Shape s, int64_t iterations, double tol) {
  WSSS_DYNAMIC_SHARED(unsigned char, shared);
  const Workspace<A> work(shared, s);
  x += blockIdx.x * s.count * s.depth;
  label += blockIdx.x * s.count;
  for_each(s.cells(), [&](int64_t i) { work.centroid[i] = A(start[blockIdx.x * s.cells() + i]); });
  __syncthreads();
  for (int64_t i = 0; i < iterations; ++i) {
    assign(x, work.centroid, label, 0, s.count, s);
    add_points(x, label, 0, s.count, work.sums, s);
    const double moved = move_centroids(work.sums, work.centroid, s);
    __syncthreads();
    if (moved <= tol) break;
  }
  assign(x, work.centroid, label, 0, s.count, s);
  for_each(s.cells(), [&](int64_t i) { centroid[blockIdx.x * s.cells() + i] = T(work.centroid[i]); });
}

// --- Sets in shares: blockIdx.x = set · shares + share.

template <class T, class A>
__global__ void lloyd_start(const T* start, A* centre, int* moving, int64_t cells, int64_t sets) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < cells) centre[i] = A(start[i]);
  if (i < sets) moving[i] = 1;
}

// The centroids of a set, copied to shared memory where they fit.
template <class A>
__device__ const A* centroids_of(const Workspace<A>& work, const A* centre, const Shape& s) {
  if (!s.near_centroids) return centre;
  for_each(s.cells(), [&](int64_t i) { work.centroid[i] = centre[i]; });
  __syncthreads();
  return work.centroid;
}

// One iteration of a share: the sums of its clusters.
template <class T, class A>
__global__ void __launch_bounds__(kThreads, 1)
    lloyd_share(const T* x, const A* centre, int64_t* label, double* sums, int* counts, const int* moving, Shape s) {
  WSSS_DYNAMIC_SHARED(unsigned char, shared);
  const int64_t set = blockIdx.x / s.shares, begin = blockIdx.x % s.shares * s.share;
  if (!moving[set]) return;
  const int64_t end = begin + s.share < s.count ? begin + s.share : s.count;
  const Workspace<A> work(shared, s);
  const Sums part{sums + blockIdx.x * s.cells(), counts + int64_t(blockIdx.x) * s.k, 1};
  x += set * s.count * s.depth;
  label += set * s.count;
  assign(x, centroids_of(work, centre + set * s.cells(), s), label, begin, end, s);
  if (s.groups == 0) return add_points(x, label, begin, end, part, s);
  add_points(x, label, begin, end, work.sums, s);
  for_each(s.cells(), [&](int64_t i) {
    double sum = 0;
    for (int g = 0; g < s.groups; ++g) sum += work.sums.sum[g * s.cells() + i];
    part.sum[i] = sum;
  });
  for_each(s.k, [&](int64_t a) {
    int count = 0;
    for (int g = 0; g < s.groups; ++g) count += work.sums.count[int64_t(g) * s.k + a];
    part.count[a] = count;
  });
}

template <class A>
__global__ void __launch_bounds__(kThreads, 1)
    lloyd_move(double* sums, int* counts, A* centre, int* moving, Shape s, double tol) {
  const int64_t set = blockIdx.x;
  if (!moving[set]) return;
  const Sums parts{sums + set * s.shares * s.cells(), counts + set * s.shares * s.k, int(s.shares)};
  const double moved = move_centroids(parts, centre + set * s.cells(), s);
  if (threadIdx.x == 0 && moved <= tol) moving[set] = 0;
}

template <class T, class A>
__global__ void __launch_bounds__(kThreads, 1)
    lloyd_finish(const T* x, const A* centre, int64_t* label, T* centroid, Shape s) {
  WSSS_DYNAMIC_SHARED(unsigned char, shared);
  const int64_t set = blockIdx.x / s.shares, begin = blockIdx.x % s.shares * s.share;
  const Workspace<A> work(shared, s);
  const A* own = centroids_of(work, centre + set * s.cells(), s);
  assign(x + set * s.count * s.depth, own, label + set * s.count, begin,
         begin + s.share < s.count ? begin + s.share : s.count, s);
  if (begin == 0) for_each(s.cells(), [&](int64_t i) { centroid[set * s.cells() + i] = T(own[i]); });
}

}  // namespace wsss::kmeans
