// Which instruction-set level the CPU kernels run at: 0 baseline, 1 x86-64-v3 (AVX2), 2 x86-64-v4 (AVX-512).
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define WSSS_MULTI_ISA 1
// Included here, before any `#pragma GCC target`, so that the kernels may use intrinsics of their level.
#include <immintrin.h>
#endif

namespace wsss {

inline const char* cpu_level_name(int level) { return level == 2 ? "avx512" : level == 1 ? "avx2" : "default"; }

// WSSS_CPU_CAPABILITY=default|avx2|avx512 lowers the level (never raises it), so that all three are testable on one
// machine.
inline int cpu_level() {
  static const int level = [] {
    int hardware = 0;
#ifdef WSSS_MULTI_ISA
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
        __builtin_cpu_supports("f16c"))
      hardware = 1;
    if (hardware && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd"))
      hardware = 2;
#endif
    const char* wish = std::getenv("WSSS_CPU_CAPABILITY");
    if (!wish || !*wish) return hardware;
    return std::min(hardware, !std::strcmp(wish, "avx512") ? 2 : !std::strcmp(wish, "avx2") ? 1 : 0);
  }();
  return level;
}

}  // namespace wsss

// One kernel of the current level: WSSS_CPU(name)(arguments). The name must be a non-template function.
#ifdef WSSS_MULTI_ISA
#define WSSS_CPU(fn) (::wsss::cpu_level() == 2 ? v4::fn : ::wsss::cpu_level() == 1 ? v3::fn : base::fn)
#else
#define WSSS_CPU(fn) base::fn
#endif
