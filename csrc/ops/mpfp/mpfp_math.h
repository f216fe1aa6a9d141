// Pooling bins, interpolation taps and the layout of one sample's maps, shared by every backend of mpfp.
#pragma once
#include <cstdint>

#ifndef __CUDACC__
#define WSSS_MPFP_BOTH
#else
#define WSSS_MPFP_BOTH __host__ __device__
#endif

namespace wsss {
namespace mpfp {

// Cells [begin, end) that the adaptive pool of `size` cells to `scale` averages for its output i.
struct Bin {
  int32_t begin, end;
};
WSSS_MPFP_BOTH inline Bin pool_bin(int64_t i, int64_t size, int64_t scale) {
  return {int32_t(i * size / scale), int32_t(((i + 1) * size + scale - 1) / scale)};
}

// Bilinear interpolation (align_corners=False) of `scale` cells at cell i of `size`: (1 - t) · low + t · high.
struct Tap {
  int32_t low, high;
  double t;
};
WSSS_MPFP_BOTH inline Tap upsample_tap(int64_t i, int64_t size, int64_t scale) {
  const double at = (double(i) + .5) * double(scale) / double(size) - .5;
  const double source = at > 0. ? at : 0.;
  const int64_t floor = int64_t(source), low = floor < scale - 1 ? floor : scale - 1;
  return {int32_t(low), int32_t(low < scale - 1 ? low + 1 : low), source - double(low)};
}

// One pyramid level: its size and the tables of both axes.
struct Level {
  int64_t scale;
  const Bin *row_bin, *column_bin;
  const Tap *row_tap, *column_tap;
};

// Maps have rows of `stride` cells, whose cells beyond `width` are 0. Inputs of a convolution have a border of zeros:
// (height + 2) rows of `padded` cells.
struct Plan {
  int64_t channels, height, width, levels, stride, padded, largest;
  const Level* level;

  int64_t plane() const { return height * stride; }
  int64_t bordered() const { return (height + 2) * padded; }
  int64_t fusions() const { return levels - 1; }
  int64_t taps() const { return 2 * channels * 9 * 4; }  // weights of one fusion: [2C][9][pos 1, pos 2, neg 1, neg 2]
  // feature, levels, fused maps, gates; signs with their border; a level's columns before its rows are made
  int64_t forward_cells() const {
    return (1 + levels + fusions()) * channels * plane() + 4 * fusions() * plane() + 4 * channels * bordered() +
           largest * (stride + largest);
  }
  // gradients of the fused map, of the finer level and of the feature; gradients of the gates with their border
  int64_t backward_cells() const { return forward_cells() + 3 * channels * plane() + 4 * bordered(); }
};

}  // namespace mpfp
}  // namespace wsss
