// Operators over all pairs of rows that never store them: sizes and layouts, shared by launchers and kernels.
// The features of both sides are copied once into PairRows; an owner's columns are packed into strips.
#pragma once
#include <cstdint>

namespace wsss {

constexpr int64_t kPairStrip = 32;     // columns of a strip, a multiple of every register block
constexpr int64_t kPairRows = 64;      // rows of a tile
constexpr int64_t kPairColumns = 256;  // columns of a tile, at most
constexpr int64_t kPairBand = 256;     // rows of a chunk's weights that the second-level cache holds
// Between the rows of a chunk's weights: an odd number of cache lines, so that a column spreads over the cache's sets.
constexpr int64_t kPairLine = kPairColumns + 16;
constexpr int64_t kPairFeatures = 64;  // features of a row that lie together

constexpr int64_t pair_round(int64_t n) { return (n + kPairStrip - 1) / kPairStrip * kPairStrip; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
// Columns of an owner's block. Few rows get narrow blocks, so that several threads find work; the choice depends on
// sizes alone, since results must not depend on the number of threads.
constexpr int64_t pair_block(int64_t rows) { return rows >= 2048 ? 128 : rows >= 512 ? 64 : 32; }
// Padded rows are readable (zeros) up to this count.
constexpr int64_t pair_padded(int64_t rows) { return ceil_div(rows, pair_block(rows)) * pair_block(rows); }

// Rows of features in the order in which products read and write them: features 0 to 63 of all rows, then the next 64
// of all rows. Every row starts a cache line, and is padded with zeros.
template <class T>
struct PairRows {
  T* data;
  int64_t rows;
  T* at(int64_t i, int64_t c) const {
    return data + (c / kPairFeatures * rows + i) * kPairFeatures + c % kPairFeatures;
  }
  PairRows from(int64_t first) const { return {data + first * kPairFeatures, rows}; }
  operator PairRows<const T>() const { return {data, rows}; }
};
constexpr int64_t pair_size(int64_t rows, int64_t depth) {
  return rows * ceil_div(depth, kPairFeatures) * kPairFeatures;
}

// A logit that is left out: its exponential is 0 at any temperature.
template <class T>
constexpr T excluded() {
  return sizeof(T) == 4 ? T(-1e30) : T(-1e300);
}

// Softmax statistics of a set of anchors: largest cosine, sum of exp((cosine - largest) / temperature) over the
// candidates, sum of the cosines of the positives.
template <class T>
struct Scores {
  T *top, *total, *positive;
};

// What the gradient needs of an anchor: its largest cosine, its weight / total, its weight / number of positives.
template <class T>
struct Weights {
  const T *top, *softmax, *positive;
};

}  // namespace wsss
