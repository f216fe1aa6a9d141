// How the threads of an operator over all pairs share the products that follow a chunk's weights.
#pragma once
#include <algorithm>

#include "wsss/pairs.h"
#include "wsss/tensor.h"

namespace wsss {

// body(feature, end, part, parts): strips of features, each in several parts where there are few features. The cut
// depends on sizes alone, and every cell of a result belongs to one call (see chunk_products).
template <class F>
void for_products(int64_t depth, const F& body) {
  const int64_t strips = ceil_div(depth, kPairStrip), parts = strips < 4 ? 4 : 1;
  parallel_for(0, strips * parts, 1, [&](int64_t b, int64_t e) {
    if (parts == 1) return body(b * kPairStrip, std::min(depth, e * kPairStrip), int64_t(0), parts);
    for (; b < e; ++b) body(b / parts * kPairStrip, std::min(depth, (b / parts + 1) * kPairStrip), b % parts, parts);
  });
}

}  // namespace wsss
