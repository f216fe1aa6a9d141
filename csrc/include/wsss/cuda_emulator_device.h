// What kernels call in the emulator: CUDA's qualifiers, barriers, warp collectives, atomics and intrinsics, and the
// host side of wsss/cuda.h. Include wsss/cuda.h instead.
#pragma once
#include <cmath>

#include "wsss/cuda_emulator.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __shared__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define warpSize 32
#define WSSS_UNROLL
#define WSSS_ROLLED

#define WSSS_SHARED(type, name, ...)                            \
  using name##_shared_type = type __VA_ARGS__;                  \
  static const char name##_shared_key = 0;                      \
  name##_shared_type& name = *static_cast<name##_shared_type*>( \
      ::wsss::emulator::machine().shared.array(&name##_shared_key, sizeof(name##_shared_type)))
#define WSSS_DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(::wsss::emulator::machine().shared.dynamic())

#define WSSS_EMULATED_VECTOR(type, short_name)                                                 \
  struct alignas(2 * sizeof(type)) short_name##2 { type x, y; };                               \
  struct short_name##3 { type x, y, z; };                                                      \
  struct alignas(sizeof(type) < 8 ? 4 * sizeof(type) : 16) short_name##4 { type x, y, z, w; }; \
  inline short_name##2 make_##short_name##2(type x, type y) { return {x, y}; }                 \
  inline short_name##3 make_##short_name##3(type x, type y, type z) { return {x, y, z}; }      \
  inline short_name##4 make_##short_name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
WSSS_EMULATED_VECTOR(float, float)
WSSS_EMULATED_VECTOR(double, double)
WSSS_EMULATED_VECTOR(int, int)
WSSS_EMULATED_VECTOR(unsigned char, uchar)
WSSS_EMULATED_VECTOR(short, short)
WSSS_EMULATED_VECTOR(long long, longlong)
#undef WSSS_EMULATED_VECTOR
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// Barriers and warp collectives.
#define WSSS_EMULATED_SITE \
  ::wsss::emulator::Site { __FILE__, __LINE__ }
#define WSSS_EMULATED_WARP(kind, mask, value) \
  ::wsss::emulator::machine().collective(::wsss::emulator::Collective::kind, (mask), (value), 0, WSSS_EMULATED_SITE)
#define __syncthreads() (void)::wsss::emulator::machine().barrier(false, WSSS_EMULATED_SITE)
#define __syncthreads_count(p) ::wsss::emulator::machine().barrier((p) != 0, WSSS_EMULATED_SITE)
#define __syncthreads_or(p) int(::wsss::emulator::machine().barrier((p) != 0, WSSS_EMULATED_SITE) != 0)
#define __syncthreads_and(p) int(::wsss::emulator::machine().barrier((p) == 0, WSSS_EMULATED_SITE) == 0)
#define __syncwarp(...) (void)WSSS_EMULATED_WARP(sync, ::wsss::emulator::mask_or_all(__VA_ARGS__), 0)
#define __ballot_sync(mask, p) unsigned(WSSS_EMULATED_WARP(ballot, mask, (p) != 0))
#define __any_sync(mask, p) int(WSSS_EMULATED_WARP(ballot, mask, (p) != 0) != 0)
#define __all_sync(mask, p) int(WSSS_EMULATED_WARP(ballot, mask, (p) == 0) == 0)
#define __match_any_sync(mask, v) unsigned(WSSS_EMULATED_WARP(match, mask, ::wsss::emulator::to_bits(v)))
#define __shfl_sync(mask, v, ...) \
  ::wsss::emulator::shuffle(WSSS_EMULATED_SITE, ::wsss::emulator::at_lane, (mask), (v), __VA_ARGS__)
#define __shfl_up_sync(mask, v, ...) \
  ::wsss::emulator::shuffle(WSSS_EMULATED_SITE, ::wsss::emulator::up, (mask), (v), __VA_ARGS__)
#define __shfl_down_sync(mask, v, ...) \
  ::wsss::emulator::shuffle(WSSS_EMULATED_SITE, ::wsss::emulator::down, (mask), (v), __VA_ARGS__)
#define __shfl_xor_sync(mask, v, ...) \
  ::wsss::emulator::shuffle(WSSS_EMULATED_SITE, ::wsss::emulator::across, (mask), (v), __VA_ARGS__)
#define WSSS_EMULATED_REDUCTION(signed_kind, unsigned_kind, mask, v)                      \
  ::wsss::emulator::reduce(WSSS_EMULATED_SITE, ::wsss::emulator::Collective::signed_kind, \
                           ::wsss::emulator::Collective::unsigned_kind, (mask), (v))
#define __reduce_add_sync(mask, v) WSSS_EMULATED_REDUCTION(add, add, mask, v)
#define __reduce_min_sync(mask, v) WSSS_EMULATED_REDUCTION(min_signed, min_unsigned, mask, v)
#define __reduce_max_sync(mask, v) WSSS_EMULATED_REDUCTION(max_signed, max_unsigned, mask, v)
#define __reduce_and_sync(mask, v) WSSS_EMULATED_REDUCTION(bit_and, bit_and, mask, v)
#define __reduce_or_sync(mask, v) WSSS_EMULATED_REDUCTION(bit_or, bit_or, mask, v)
#define __reduce_xor_sync(mask, v) WSSS_EMULATED_REDUCTION(bit_xor, bit_xor, mask, v)

namespace wsss::emulator {

inline unsigned mask_or_all(unsigned mask = ~0u) { return mask; }

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "a warp collective moves at most 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}
template <class To, class From>
To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From), "a cast of bits keeps the size");
  To to;
  std::memcpy(&to, &value, sizeof to);
  return to;
}

// The lane that a shuffle reads, within segments of width lanes. As in CUDA a lane reads itself at a segment's end.
inline int at_lane(int lane, int source, int width) { return (lane & ~(width - 1)) + (source & (width - 1)); }
inline int up(int lane, int distance, int width) {
  const int source = lane - distance;
  return source < (lane & ~(width - 1)) ? lane : source;
}
inline int down(int lane, int distance, int width) {
  const int source = lane + distance;
  return source > (lane | (width - 1)) ? lane : source;
}
inline int across(int lane, int mask, int width) {
  const int source = lane ^ mask;
  return source > (lane | (width - 1)) ? lane : source;
}

template <class T>
T shuffle(Site site, int (*source)(int, int, int), unsigned mask, T value, int argument, int width = kWarp) {
  Machine& m = machine();
  const uint64_t bits =
      m.collective(Collective::shuffle, mask, to_bits(value), source(m.lane(), argument, width) & 31, site);
  T result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

template <class T>
T reduce(Site site, Collective signed_kind, Collective unsigned_kind, unsigned mask, T value) {
  static_assert(std::is_integral<T>::value && sizeof(T) == 4, "__reduce_*_sync takes int or unsigned");
  return T(uint32_t(
      machine().collective(std::is_signed<T>::value ? signed_kind : unsigned_kind, mask, uint32_t(value), 0, site)));
}

// Every atomic of the emulator: reads, lets change compute, writes, returns what was there.
template <class T, class F>
T atomic(T* at, const F& change) {
  static_assert(std::is_integral<T>::value, "atomics on floating-point numbers make results depend on the order");
  machine().at_atomic();
  const T before = *at;
  *at = change(before);
  return before;
}
template <class T>
struct same {
  using type = T;
};

}  // namespace wsss::emulator

// The second operand converts to the type of the cell, as in CUDA's overloads.
#define WSSS_EMULATED_ATOMIC(name, expression)                                 \
  template <class T>                                                           \
  T name(T* at, typename ::wsss::emulator::same<T>::type v) {                  \
    return ::wsss::emulator::atomic(at, [v](T old) { return T(expression); }); \
  }
WSSS_EMULATED_ATOMIC(atomicAdd, old + v)
WSSS_EMULATED_ATOMIC(atomicSub, old - v)
WSSS_EMULATED_ATOMIC(atomicMin, old < v ? old : v)
WSSS_EMULATED_ATOMIC(atomicMax, old < v ? v : old)
WSSS_EMULATED_ATOMIC(atomicAnd, old& v)
WSSS_EMULATED_ATOMIC(atomicOr, old | v)
WSSS_EMULATED_ATOMIC(atomicXor, old ^ v)
WSSS_EMULATED_ATOMIC(atomicInc, old >= v ? 0 : old + 1)
WSSS_EMULATED_ATOMIC(atomicDec, (old == 0 || old > v) ? v : old - 1)
#undef WSSS_EMULATED_ATOMIC
template <class T>
T atomicExch(T* at, typename ::wsss::emulator::same<T>::type v) {
  return ::wsss::emulator::atomic(at, [v](T) { return v; });
}
template <class T>
T atomicCAS(T* at, typename ::wsss::emulator::same<T>::type expected, typename ::wsss::emulator::same<T>::type v) {
  return ::wsss::emulator::atomic(at, [=](T old) { return old == expected ? v : old; });
}

// Memory.
#define __threadfence() ((void)0)
#define __threadfence_block() ((void)0)
#define __threadfence_system() ((void)0)
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, typename ::wsss::emulator::same<T>::type v) {
  *p = v;
}
template <class T>
void __stcg(T* p, typename ::wsss::emulator::same<T>::type v) {
  *p = v;
}

// Integers and bits.
using std::max;
using std::min;
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __clz(int v) { return v ? __builtin_clz(unsigned(v)) : 32; }
inline int __clzll(long long v) { return v ? __builtin_clzll(static_cast<unsigned long long>(v)) : 64; }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __ffsll(long long v) { return __builtin_ffsll(v); }
inline unsigned __brev(unsigned v) {
  unsigned r = 0;
  for (int i = 0; i < 32; ++i) r |= (v >> i & 1) << (31 - i);
  return r;
}
inline unsigned long long __brevll(unsigned long long v) {
  return static_cast<unsigned long long>(__brev(unsigned(v))) << 32 | __brev(unsigned(v >> 32));
}
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned n) {
  return unsigned(((uint64_t(high) << 32 | low) << (n & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned n) {
  return unsigned((uint64_t(high) << 32 | low) >> (n & 31));
}
inline int __float_as_int(float v) { return wsss::emulator::bit_cast<int>(v); }
inline unsigned __float_as_uint(float v) { return wsss::emulator::bit_cast<unsigned>(v); }
inline float __int_as_float(int v) { return wsss::emulator::bit_cast<float>(v); }
inline float __uint_as_float(unsigned v) { return wsss::emulator::bit_cast<float>(v); }
inline long long __double_as_longlong(double v) { return wsss::emulator::bit_cast<long long>(v); }
inline double __longlong_as_double(long long v) { return wsss::emulator::bit_cast<double>(v); }

// Floating point. The C library declares some of these names for itself, hence macros.
#define __expf(x) ::std::exp(float(x))
#define __exp10f(x) ::std::pow(10.f, float(x))
#define __logf(x) ::std::log(float(x))
#define __log2f(x) ::std::log2(float(x))
#define __log10f(x) ::std::log10(float(x))
#define __sinf(x) ::std::sin(float(x))
#define __cosf(x) ::std::cos(float(x))
#define __tanf(x) ::std::tan(float(x))
#define __powf(x, y) ::std::pow(float(x), float(y))
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline double rsqrt(double x) { return 1. / std::sqrt(x); }
inline float __saturatef(float x) { return x > 0.f ? (x < 1.f ? x : 1.f) : 0.f; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __frcp_rn(float a) { return 1.f / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __frsqrt_rn(float a) { return 1.f / std::sqrt(a); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline double __dsqrt_rn(double a) { return std::sqrt(a); }
inline int __float2int_rn(float x) { return int(std::nearbyint(x)); }
inline int __float2int_rz(float x) { return int(x); }
inline int __float2int_rd(float x) { return int(std::floor(x)); }
inline int __float2int_ru(float x) { return int(std::ceil(x)); }
inline float __int2float_rn(int x) { return float(x); }

// The host's side.
using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t = nullptr) {
  std::memset(at, value, bytes);
  return cudaSuccess;
}

namespace wsss {

inline void check_cuda(cudaError_t, const char*) {}
inline size_t max_shared_bytes() { return emulator::kMaxShared; }
inline int multiprocessors() { return emulator::kMultiprocessors; }

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t, A... arguments) {
  const std::tuple<std::decay_t<P>...> values(static_cast<P>(arguments)...);
  auto body = [&] { std::apply(kernel, values); };
  emulator::machine().launch(grid, block, shared_bytes, [](void* b) { (*static_cast<decltype(body)*>(b))(); }, &body);
}

// The source is read at once (so that a bad address is reported where it stands); the value arrives at the wait, and
// until then the target holds NaN.
template <int kBytes>
void copy_async(void* shared, const void* global, bool valid = true) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
  WSSS_CHECK(reinterpret_cast<uintptr_t>(shared) % kBytes == 0 &&
                 (!valid || reinterpret_cast<uintptr_t>(global) % kBytes == 0),
             "emulator: copy_async of ", kBytes, " bytes at an address that is not a multiple of it");
  emulator::Thread& t = emulator::machine().thread();
  emulator::AsyncCopy copy{shared, kBytes, t.groups, {}};
  if (valid) std::memcpy(copy.value, global, kBytes);
  std::memset(shared, 0xff, kBytes);
  t.copies.push_back(copy);
}
inline void copy_async_commit() { ++emulator::machine().thread().groups; }
template <int kPending>
void copy_async_wait() {
  emulator::Thread& t = emulator::machine().thread();
  size_t kept = 0;
  for (const emulator::AsyncCopy& copy : t.copies) {
    if (copy.group < t.groups - kPending)
      std::memcpy(copy.target, copy.value, size_t(copy.bytes));
    else
      t.copies[kept++] = copy;
  }
  t.copies.resize(kept);
}

namespace emulator::conversion {
#include "wsss/vector_math.inc"
}  // namespace emulator::conversion
inline uint32_t half2_bits(float low, float high) {
  return uint32_t(emulator::conversion::float_to_half(low)) | uint32_t(emulator::conversion::float_to_half(high)) << 16;
}
inline float2 half2_floats(uint32_t bits) {
  return {emulator::conversion::half_to_float(uint16_t(bits)),
          emulator::conversion::half_to_float(uint16_t(bits >> 16))};
}
inline void compute_here(uint32_t&) {}
inline float exp2_fast(float x) { return std::exp2(x); }

}  // namespace wsss
