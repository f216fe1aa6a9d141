// Operators over all pairs of rows that never store them: sizes and layouts, shared by launchers and kernels.
// The features of both sides are copied once into padded rows; an owner's columns are packed into strips.
#pragma once
#include <cstdint>

namespace wsss {

constexpr int64_t kPairStrip = 32;                // columns of a strip, a multiple of every register block
constexpr int64_t kPairRows = 64;                 // rows of a tile
constexpr int64_t kPairColumns = 256;             // columns of a tile, at most
constexpr int64_t kPairBand = 256;                // rows of a chunk's weights that the second-level cache holds
constexpr int64_t kPairLine = kPairColumns + 16;  // between the rows of a chunk's weights; see pair_stride

constexpr int64_t pair_round(int64_t n) { return (n + kPairStrip - 1) / kPairStrip * kPairStrip; }
// An odd number of cache lines apart, so that the rows of a panel spread over the sets of the cache.
constexpr int64_t pair_stride(int64_t depth) { return pair_round(depth) + 16; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
// Columns of an owner's block. Few rows get narrow blocks, so that several threads find work; the choice depends on
// sizes alone, since results must not depend on the number of threads.
constexpr int64_t pair_block(int64_t rows) { return rows >= 2048 ? 128 : rows >= 512 ? 64 : 32; }
// Padded rows are readable (zeros) up to this count, their columns up to pair_round(depth).
constexpr int64_t pair_padded(int64_t rows) { return ceil_div(rows, pair_block(rows)) * pair_block(rows); }

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
