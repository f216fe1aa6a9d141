// The arguments of a pass over all pairs of the contrastive losses.
#pragma once
#include "wsss/pairs.h"

namespace wsss {
namespace contrastive {

// Both sides in the padded layout of pairs.h. `id` numbers the labels; equal numbers are positives.
template <class T>
struct Pairs {
  const T *x, *y, *id;
  int64_t count, depth;
  T inverse_temperature;
};

}  // namespace contrastive
}  // namespace wsss
