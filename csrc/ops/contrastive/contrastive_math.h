// What the kernels of the contrastive losses share: the arguments of a pass over all pairs, and the statistics of a row.
#pragma once
#include "wsss/pairs.h"

namespace wsss {
namespace contrastive {

// A logit that is left out: its exponential is 0 at any temperature.
template <class T>
constexpr T excluded() {
  return sizeof(T) == 4 ? T(-1e30) : T(-1e300);
}

// Softmax statistics of a set of anchors: largest cosine, sum of exp((cosine - largest) / temperature) over the candidates,
// sum of the cosines of the positives.
template <class T>
struct Scores {
  T *top, *total, *positive;
};

// What the gradient needs of an anchor: its largest cosine, its weight / total, its weight / number of positives.
template <class T>
struct Weights {
  const T *top, *softmax, *positive;
};

// Both sides in the padded layout of pairs.h. `id` numbers the labels; equal numbers are positives.
template <class T>
struct Pairs {
  const T *x, *y, *id;
  int64_t count, depth;
  T inverse_temperature;
};

}  // namespace contrastive
}  // namespace wsss
