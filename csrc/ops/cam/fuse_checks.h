// What fuse_cams asks of its arguments, on every device.
#pragma once
#include <optional>

#include "wsss/tensor.h"

namespace wsss {
namespace cam {

inline void check_map(const Tensor& map, const Tensor& first, int64_t height, int64_t width) {
  WSSS_CHECK(map.dim() == 4 && map.size(0) == first.size(0) && map.size(1) == first.size(1) && map.size(2) > 0 &&
                 map.size(3) > 0 && map.scalar_type() == first.scalar_type() && height > 0 && width > 0,
             "fuse_cams: maps B×K×h×w of one dtype and a size of at least 1×1 expected");
}

inline std::optional<Tensor> checked_gate(const std::optional<Tensor>& present, const Tensor& map) {
  if (!present) return std::nullopt;
  WSSS_CHECK(present->dim() == 2 && present->size(0) == map.size(0) && present->size(1) == map.size(1) &&
                 present->scalar_type() == map.scalar_type(),
             "fuse_cams: present must be B×K of the dtype of the maps");
  return dense(*present);
}

}  // namespace cam
}  // namespace wsss
