// Distance and similarity of two Gaussians from inner products (M1 Eq. 1-5), and their derivatives, shared by all
// backends.
#pragma once
#include "wsss/pairs.h"

namespace wsss {
namespace wasserstein {

#if defined(__CUDACC__)
#define WSSS_PAIR_MATH __host__ __device__ inline
#else
#define WSSS_PAIR_MATH static inline __attribute__((always_inline, unused))
#endif

// a, b, lambda of Eq. 2 and 4, and 1 / temperature.
template <class T>
struct Constants {
  T a, b, lambda, inverse_temperature;
};

// Eq. 1 from centred data: |x|^2 + |y|^2 - 2 x·y, never below 0 (and NaN stays NaN).
template <class T>
WSSS_PAIR_MATH T squared_distance(T norm_x, T norm_y, T product) {
  const T d = (norm_x + norm_y) - T(2) * product;
  return d < T(0) ? T(0) : d;
}

// |sx - sy|^2 of normalised rows, clamped so that its root is at least 1e-6. unit_x is 0 for a zero row, else 1.
template <class T>
WSSS_PAIR_MATH T semantic_square(T unit_x, T unit_y, T cosine) {
  const T d = (unit_x + unit_y) - T(2) * cosine;
  return d < T(1e-12) ? T(1e-12) : d;
}

// Arguments of the passes. x and y: centred [mu, sigma]; sx and sy: normalised semantic rows.
template <class T>
struct Sides {
  PairRows<const T> x, y, sx, sy;
  const T *norm_x, *norm_y, *unit_x, *unit_y;
  int64_t rows, columns, depth, semantic_depth;
};

// What a pass does with a pair.
enum class Target { kDistance, kSimilarity, kLoss };

}  // namespace wasserstein
}  // namespace wsss
