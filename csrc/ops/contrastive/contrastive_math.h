// The arguments of a pass over all pairs of the contrastive losses.
#pragma once
#include "wsss/pairs.h"

namespace wsss {
namespace contrastive {

// `id` numbers the labels; equal numbers are positives.
template <class T>
struct Pairs {
  PairRows<const T> x, y;
  const T* id;
  int64_t count, depth;
  T inverse_temperature;
};

}  // namespace contrastive
}  // namespace wsss
