// The maps of a tensor …×h×w, and how many of them are worth a thread of their own on a CPU.
#pragma once
#include "wsss/tensor.h"

namespace wsss {
namespace box_mask {

struct Maps {
  int64_t h, w, count, grain;

  Maps(const char* op, const Tensor& t) {
    const int64_t rank = t.dim();
    WSSS_CHECK(rank >= 2, op, ": …×h×w expected, got ", rank, " dimensions");
    h = t.size(rank - 2);
    w = t.size(rank - 1);
    WSSS_CHECK(h > 0 && w > 0, op, ": a map must not be empty, got ", h, "×", w);
    WSSS_CHECK(h < (int64_t(1) << 31) && w < (int64_t(1) << 31) && h * w < int64_t(1) << 31, op,
               ": a map must have fewer than 2^31 pixels, got ", h, "×", w);
    count = t.numel() / (h * w);
    grain = std::max<int64_t>(1, 65536 / (h * w));
  }
  int64_t pixels() const { return h * w; }
};

// bool or uint8 maps.
inline Maps checked_components(const Tensor& mask, int64_t connectivity) {
  const Maps maps("connected_components", mask);
  WSSS_CHECK(connectivity == 4 || connectivity == 8, "connected_components: connectivity must be 4 or 8, got ",
             connectivity);
  WSSS_CHECK(mask.scalar_type() == ScalarType::Bool || mask.scalar_type() == ScalarType::Byte,
             "connected_components: bool or uint8 expected, got ", torch::headeronly::toString(mask.scalar_type()));
  return maps;
}

}  // namespace box_mask
}  // namespace wsss
