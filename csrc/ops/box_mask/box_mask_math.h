// The quantisation of a class activation map to the grey levels of an 8-bit image, which decides what is foreground.
#pragma once
#include <cmath>

#ifndef WSSS_HD
#if defined(__CUDACC__)
#define WSSS_HD __host__ __device__ inline
#else
#define WSSS_HD inline
#endif
#endif

namespace wsss {

// Grey level of a value, from its product with 255: truncated, clamped to 0…255, NaN gives 0.
template <class T>
WSSS_HD int grey_level(T product) {
  return product > T(0) ? (product < T(255) ? int(product) : 255) : 0;
}

constexpr int kAllForeground = -1, kNoForeground = 255;

// The highest grey level that is still background in a map whose highest one is `highest`. Where it is neither of the
// two constants, "grey level > background" is the same as "product with 255 ≥ background + 1", NaN and ∞ included.
WSSS_HD int background_level(double threshold, int highest) {
  const double level = std::trunc(threshold * highest);
  return level >= highest ? kNoForeground : level < 0 ? kAllForeground : int(level);
}

}  // namespace wsss
