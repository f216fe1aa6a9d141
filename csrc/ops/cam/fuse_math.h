// Bilinear resizing with align_corners=True, shared by every backend of fuse_cams.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define WSSS_CAM_BOTH __host__ __device__
#else
#define WSSS_CAM_BOTH
#endif

namespace wsss {
namespace cam {

// (1 - t) · low + t · high.
struct Tap {
  int32_t low, high;
  double t;
};

// Of cell i of `to`, among `from` cells.
WSSS_CAM_BOTH inline Tap resize_tap(int64_t i, int64_t from, int64_t to) {
  const double step = to > 1 ? double(from - 1) / double(to - 1) : 0.;
  const double at = step * double(i);
  const int64_t floor = int64_t(at), low = floor < from - 1 ? floor : from - 1;
  return {int32_t(low), int32_t(low + 1 < from ? low + 1 : low), at - double(low)};
}

}  // namespace cam
}  // namespace wsss
