// Compiles the file named by WSSS_CPU_KERNELS once per instruction-set level, in namespaces base, v3 and v4 of the
// enclosing namespace. Usage, inside the operator's namespace:
//   #define WSSS_CPU_KERNELS "ops/par/par_cpu.inc"
//   #include "wsss/cpu_kernels.h"
// No include guard: one translation unit may compile several kernel files.
// The .inc sees WSSS_LEVEL (0, 1, 2) and WSSS_LANES (floats per vector register), includes nothing itself, and marks
// its functions static. Loops must not call non-inlined templates of the standard library: those are compiled for the
// baseline.
namespace base {
#define WSSS_LEVEL 0
#define WSSS_LANES 4
#include WSSS_CPU_KERNELS
#undef WSSS_LEVEL
#undef WSSS_LANES
}  // namespace base
#ifdef WSSS_MULTI_ISA
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace v3 {
#define WSSS_LEVEL 1
#define WSSS_LANES 8
#include WSSS_CPU_KERNELS
#undef WSSS_LEVEL
#undef WSSS_LANES
}  // namespace v3
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
namespace v4 {
#define WSSS_LEVEL 2
#define WSSS_LANES 16
#include WSSS_CPU_KERNELS
#undef WSSS_LEVEL
#undef WSSS_LANES
}  // namespace v4
#pragma GCC pop_options
#endif
#undef WSSS_CPU_KERNELS

// name(T{}): the kernel name_f32 or name_f64 of the current level.
#ifndef WSSS_PICK
#define WSSS_PICK(name)                                    \
  static auto name(float) { return WSSS_CPU(name##_f32); } \
  static auto name(double) { return WSSS_CPU(name##_f64); }
#endif
