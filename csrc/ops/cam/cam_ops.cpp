#include "wsss/tensor.h"

namespace wsss {
namespace cam {
namespace {

#define WSSS_CPU_KERNELS "ops/cam/cam_cpu.inc"
#include "wsss/cpu_kernels.h"

// The number of maps of …×h×w and their pixels.
struct Maps {
  int64_t count, pixels, grain;

  Maps(const char* op, const Tensor& t) {
    const int64_t rank = t.dim();
    WSSS_CHECK(rank >= 2, op, ": …×h×w expected, got ", rank, " dimensions");
    pixels = t.size(rank - 2) * t.size(rank - 1);
    WSSS_CHECK(pixels > 0, op, ": a map must not be empty, got ", t.size(rank - 2), "×", t.size(rank - 1));
    count = t.numel() / pixels;
    grain = std::max<int64_t>(1, 65536 / pixels);
  }
};

Tensor normalize_cam_fwd(const Tensor& cam, double eps) {
  const Maps maps("normalize_cam", cam);
  WSSS_PATH("normalize_cam.fwd");
  const Tensor given = dense(cam);
  Tensor result = new_empty(cam, sizes_of(cam));
  for_float_type("normalize_cam", cam, [&](auto tag) {
    using T = decltype(tag);
    const T* x = in<T>(given);
    T* y = out<T>(result);
    parallel_for(0, maps.count, maps.grain, [&](int64_t begin, int64_t end) {
      const int64_t at = begin * maps.pixels;
      if constexpr (sizeof(T) == 4)
        WSSS_CPU(normalize_f32)(x + at, end - begin, maps.pixels, eps, y + at);
      else
        WSSS_CPU(normalize_f64)(x + at, end - begin, maps.pixels, eps, y + at);
    });
  });
  return result;
}

Tensor normalize_cam_bwd(const Tensor& grad, const Tensor& cam, double eps) {
  const Maps maps("normalize_cam", cam);
  WSSS_CHECK(sizes_of(grad) == sizes_of(cam) && grad.scalar_type() == cam.scalar_type(),
             "normalize_cam: the gradient must have the shape and dtype of cam");
  WSSS_PATH("normalize_cam.bwd");
  const Tensor given = dense(cam), cotangent = dense(grad);
  Tensor result = new_empty(cam, sizes_of(cam));
  for_float_type("normalize_cam", cam, [&](auto tag) {
    using T = decltype(tag);
    const T *g = in<T>(cotangent), *x = in<T>(given);
    T* y = out<T>(result);
    parallel_for(0, maps.count, maps.grain, [&](int64_t begin, int64_t end) {
      const int64_t at = begin * maps.pixels;
      if constexpr (sizeof(T) == 4)
        WSSS_CPU(normalize_grad_f32)(g + at, x + at, end - begin, maps.pixels, eps, y + at);
      else
        WSSS_CPU(normalize_grad_f64)(g + at, x + at, end - begin, maps.pixels, eps, y + at);
    });
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(wsss, m) {
  m.def("normalize_cam_fwd(Tensor cam, float eps) -> Tensor");
  m.def("normalize_cam_bwd(Tensor grad, Tensor cam, float eps) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(wsss, CPU, m) {
  m.impl("normalize_cam_fwd", TORCH_BOX(&normalize_cam_fwd));
  m.impl("normalize_cam_bwd", TORCH_BOX(&normalize_cam_bwd));
}

}  // namespace cam
}  // namespace wsss
