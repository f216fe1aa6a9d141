// What every CUDA kernel file includes. Under nvcc it is CUDA; under a C++ compiler with -DWSSS_EMULATE the same
// kernels run on the host (cuda_emulator.h), so that the ordinary tests execute the very source that the GPU runs.
//
// Beyond CUDA's own language both sides offer, with one meaning:
//   launch(kernel, grid, block, shared_bytes, stream, arguments...)
//   WSSS_SHARED(float, tile, [32][33]);      static shared memory; in the emulator fenced and filled with NaN per block
//   WSSS_DYNAMIC_SHARED(float, buffer);      dynamic shared memory, 16-byte aligned, likewise
//   WSSS_UNROLL, WSSS_ROLLED                 before a loop that must be unrolled (arrays in registers), or must not be
//   copy_async, copy_async_commit, copy_async_wait         global to shared memory without registers (cp.async)
//   half2_bits, half2_floats                               two float16 in one word
//   compute_here                                           against work that the compiler moves out of a loop
//   max_shared_bytes(), multiprocessors()                  of the current device, for the choice of a launch
// Plain `__shared__` works too, without the fences. Kernels are templates over the element type; float16 and bfloat16
// come as c10::Half and c10::BFloat16 from cuda_tensor.h, so that this header needs no PyTorch.
#pragma once
#include <cstddef>
#include <cstdint>

#include "wsss/check.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define WSSS_UNROLL _Pragma("unroll")
#define WSSS_ROLLED _Pragma("unroll 1")
#define WSSS_SHARED(type, name, ...) __shared__ type name __VA_ARGS__
#define WSSS_DYNAMIC_SHARED(type, name)                                 \
  extern __shared__ __align__(16) unsigned char wsss_dynamic_shared_[]; \
  type* const name = reinterpret_cast<type*>(wsss_dynamic_shared_)

namespace wsss {

inline void check_cuda(cudaError_t status, const char* what) {
  WSSS_CHECK(status == cudaSuccess, what, ": CUDA error ", cudaGetErrorName(status), ": ", cudaGetErrorString(status));
}

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, A... arguments) {
  // Beyond 48 KB a kernel must ask; asking is no stream operation, so graph capture does not mind.
  if (shared_bytes > (48u << 10))
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)),
               "shared memory of a kernel");
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<P>(arguments)...);
  check_cuda(cudaGetLastError(), "kernel launch");
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check_cuda(cudaGetDevice(&device), "current device");
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "device attribute");
  return value;
}
inline size_t max_shared_bytes() { return size_t(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)); }
inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

// Starts the copy of kBytes (4, 8 or 16, aligned to it) from global to shared memory; zeros arrive where valid is
// false, and then the source is not read. Visible to this thread after copy_async_wait, to the block after a barrier
// more.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid = true) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
  const unsigned target = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const int read = valid ? kBytes : 0;
  if constexpr (kBytes == 16)  // past the first-level cache: a whole sector goes to one place
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(global), "r"(read) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(target), "l"(global), "n"(kBytes), "r"(read)
                 : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending of the committed groups of this thread are still under way.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ uint32_t half2_bits(float low, float high) {
  const __half2 packed = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&packed);
}
__device__ __forceinline__ float2 half2_floats(uint32_t bits) {
  return __half22float2(*reinterpret_cast<const __half2*>(&bits));
}

// Keeps the compiler from computing ahead, outside a loop, what follows from this value: that would cost registers.
__device__ __forceinline__ void compute_here(uint32_t& value) { asm volatile("" : "+r"(value)); }

// 2^x of one hardware instruction: about 2 ulp, and results below 2^-126 are 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace wsss

#elif defined(WSSS_EMULATE)
#include "wsss/cuda_emulator.h"
#include "wsss/cuda_emulator_device.h"
#else
#error "wsss/cuda.h: compile with nvcc, or with a C++ compiler and -DWSSS_EMULATE"
#endif
