// Where the tokens of a window come from, shared by every backend: cyclic shift, padding and Swin's regions as
// arithmetic.
#pragma once
#include <cstdint>

#ifndef __CUDACC__
#define WSSS_WINDOW_BOTH
#else
#define WSSS_WINDOW_BOTH __host__ __device__
#endif

namespace wsss {
namespace window_attention {

struct Geometry {
  int64_t batch, height, width, channels, heads, window_height, window_width, shift_y, shift_x;
  double scale;

  int64_t depth() const { return channels / heads; }
  int64_t rows() const { return (height + window_height - 1) / window_height; }
  int64_t columns() const { return (width + window_width - 1) / window_width; }
  int64_t windows() const { return batch * rows() * columns(); }
  int64_t slots() const { return window_height * window_width; }
  int64_t stride() const { return (slots() + 31) / 32 * 32; }                           // cells of a row of weights
  int64_t offsets() const { return (2 * window_height - 1) * (2 * window_width - 1); }  // rows of the bias table
};

// Source position of a shifted position in one axis: wrapped around the padded extent, which also names its region.
struct Source {
  int64_t at;
  bool wrapped;
};
WSSS_WINDOW_BOTH inline Source source_of(int64_t shifted, int64_t shift, int64_t padded) {
  const int64_t at = shifted + shift;
  return at < padded ? Source{at, false} : Source{at - padded, true};
}

// Row of the bias table for a query's and a key's slot in a window of this width is difference(query) - difference(key)
// + difference of the last slot.
WSSS_WINDOW_BOTH inline int64_t difference(int64_t slot, int64_t window_width) {
  return slot / window_width * (2 * window_width - 1) + slot % window_width;
}

}  // namespace window_attention
}  // namespace wsss
