// What the threads of a CUDA block compute together, in one order whatever the order in which they run. Every thread of
// the block must call; the block is a row of whole warps.
#pragma once
#include "wsss/cuda.h"

namespace wsss {

constexpr int kWarpThreads = 32;

// Joins one value of every thread in a fixed tree; all threads get the result.
template <class T, class F>
__device__ __forceinline__ T block_reduce(T value, const F& join) {
  WSSS_SHARED(T, parts, [kWarpThreads]);
  const int lane = int(threadIdx.x) % kWarpThreads, warp = int(threadIdx.x) / kWarpThreads;
  WSSS_UNROLL
  for (int d = kWarpThreads / 2; d > 0; d /= 2) value = join(value, T(__shfl_xor_sync(~0u, value, d)));
  __syncthreads();  // the parts of an earlier call have been read
  if (lane == 0) parts[warp] = value;
  __syncthreads();
  value = parts[0];
  for (int w = 1; w < int(blockDim.x) / kWarpThreads; ++w) value = join(value, parts[w]);
  return value;
}

template <class T>
__device__ __forceinline__ T block_sum(T value) {
  return block_reduce(value, [](T a, T b) { return a + b; });
}
template <class T>
__device__ __forceinline__ T block_max(T value) {
  return block_reduce(value, [](T a, T b) { return b > a ? b : a; });
}
template <class T>
__device__ __forceinline__ T block_min(T value) {
  return block_reduce(value, [](T a, T b) { return b < a ? b : a; });
}

// The number of threads before this one whose flag is set; adds that of the whole block to `total`.
__device__ __forceinline__ int block_rank(bool flag, int& total) {
  WSSS_SHARED(int, counts, [kWarpThreads]);
  const int lane = int(threadIdx.x) % kWarpThreads, warp = int(threadIdx.x) / kWarpThreads;
  const unsigned flags = __ballot_sync(~0u, flag);
  __syncthreads();
  if (lane == 0) counts[warp] = __popc(flags);
  __syncthreads();
  int before = total;
  for (int w = 0; w < int(blockDim.x) / kWarpThreads; ++w) {
    if (w < warp) before += counts[w];
    total += counts[w];
  }
  return before + __popc(flags & ((1u << lane) - 1));
}

// Sum of `value` over the lanes up to this one.
template <class T>
__device__ __forceinline__ T warp_prefix(T value) {
  const int lane = int(threadIdx.x) % kWarpThreads;
  WSSS_UNROLL
  for (int d = 1; d < kWarpThreads; d *= 2) {
    const T below = T(__shfl_up_sync(~0u, value, d));
    if (lane >= d) value += below;
  }
  return value;
}

__host__ __device__ constexpr int64_t blocks_for(int64_t n, int64_t size) { return (n + size - 1) / size; }

}  // namespace wsss
