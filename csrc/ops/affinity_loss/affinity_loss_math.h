// The arguments of a pass over all pairs of cells (M4 Eq. 3.20-3.21).
#pragma once
#include "wsss/pairs.h"

namespace wsss {
namespace affinity_loss {

enum class Kind { kBalanced, kBce };

// One image: features in rows of cells. `label` numbers the classes and is -1 where a cell is void. `y` and `x` are the
// coordinates of the cells, `radius` is negative where there is no limit.
template <class T>
struct Cells {
  PairRows<const T> rows;
  const T *label, *y, *x;
  int64_t count, depth;
  T radius;
};

}  // namespace affinity_loss
}  // namespace wsss
