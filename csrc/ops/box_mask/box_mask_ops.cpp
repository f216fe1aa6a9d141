#include "ops/box_mask/box_mask_math.h"
#include "ops/box_mask/maps.h"

namespace wsss {
namespace box_mask {
namespace {

#define WSSS_CPU_KERNELS "ops/box_mask/box_mask_cpu.inc"
#include "wsss/cpu_kernels.h"

Tensor box_mask_fwd(const Tensor& cam, double threshold, bool clip_border) {
  const Maps maps("box_mask", cam);
  WSSS_CHECK(std::isfinite(threshold), "box_mask: threshold must be finite, got ", threshold);
  const Tensor given = dense(cam);
  Tensor mask = new_empty(cam, sizes_of(cam));
  if (maps.w <= 64) {
    WSSS_PATH("box_mask.narrow");
  } else {
    WSSS_PATH("box_mask.wide");
  }
  for_float_type("box_mask", cam, [&](auto tag) {
    using T = decltype(tag);
    const T* x = in<T>(given);
    T* y = out<T>(mask);
    parallel_for(0, maps.count, maps.grain, [&](int64_t begin, int64_t end) {
      const int64_t at = begin * maps.h * maps.w;
      if constexpr (sizeof(T) == 4)
        WSSS_CPU(box_masks_f32)(x + at, end - begin, maps.h, maps.w, threshold, clip_border, y + at);
      else
        WSSS_CPU(box_masks_f64)(x + at, end - begin, maps.h, maps.w, threshold, clip_border, y + at);
    });
  });
  return mask;
}

Tensor connected_components_fwd(const Tensor& mask, int64_t connectivity) {
  const Maps maps = checked_components(mask, connectivity);
  WSSS_PATH("connected_components");
  const Tensor given = dense(mask);
  Tensor label = new_empty(mask, sizes_of(mask), ScalarType::Int);
  const auto* x = static_cast<const uint8_t*>(given.const_data_ptr());
  int32_t* y = out<int32_t>(label);
  parallel_for(0, maps.count, maps.grain, [&](int64_t begin, int64_t end) {
    const int64_t at = begin * maps.h * maps.w;
    WSSS_CPU(label_maps)(x + at, end - begin, maps.h, maps.w, int(connectivity), y + at);
  });
  return label;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(wsss, m) {
  m.def("box_mask_fwd(Tensor cam, float threshold, bool clip_border) -> Tensor");
  m.def("connected_components_fwd(Tensor mask, int connectivity) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(wsss, CPU, m) {
  m.impl("box_mask_fwd", TORCH_BOX(&box_mask_fwd));
  m.impl("connected_components_fwd", TORCH_BOX(&connected_components_fwd));
}

}  // namespace box_mask
}  // namespace wsss
