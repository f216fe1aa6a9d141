// Normalisation of class activation maps of CUDA tensors: arguments, launches, registration.
#include "ops/cam/cam_kernels.cuh"
#include "wsss/cuda_tensor.h"

namespace wsss::cam {
namespace {

struct Maps {
  int64_t count, pixels, tiles;

  explicit Maps(const Tensor& t) {
    const int64_t rank = t.dim();
    WSSS_CHECK(rank >= 2, "normalize_cam: …×h×w expected, got ", rank, " dimensions");
    pixels = t.size(rank - 2) * t.size(rank - 1);
    WSSS_CHECK(pixels > 0, "normalize_cam: a map must not be empty, got ", t.size(rank - 2), "×", t.size(rank - 1));
    count = t.numel() / pixels;
    tiles = blocks_for(pixels, kTilePixels);
    WSSS_CHECK(count * tiles < (int64_t(1) << 31), "normalize_cam: too many maps");
  }
  dim3 grid() const { return dim3(static_cast<unsigned>(count * tiles)); }
};

// Uninitialised cells of a plain structure for every tile.
template <class P>
class Parts {
 public:
  Parts(const Tensor& like, const Maps& maps)
      : tensor_(new_empty(like, {maps.count * maps.tiles * int64_t(sizeof(P))}, ScalarType::Byte)) {}
  P* data() const { return static_cast<P*>(tensor_.mutable_data_ptr()); }

 private:
  Tensor tensor_;
};

Tensor normalize_cam_fwd(const Tensor& cam, double eps) {
  const Maps maps(cam);
  const OnDevice device(cam);
  const Tensor given = dense(cam);
  Tensor result = new_empty(cam, sizes_of(cam));
  if (!maps.count) return result;
  for_cuda_type("normalize_cam", cam, [&](auto tag) {
    using T = decltype(tag);
    using A = accumulator_t<T>;
    const T* x = in<T>(given);
    T* y = out<T>(result);
    const dim3 block(kThreads);
    if (maps.tiles == 1) {
      WSSS_PATH("normalize_cam.cuda.block.fwd");
      launch(normalize_block<T, A>, maps.grid(), block, 0, device.stream(), x, y, maps.pixels, A(eps));
      return;
    }
    WSSS_PATH("normalize_cam.cuda.tiles.fwd");
    const Parts<Extrema<A>> parts(cam, maps);
    launch(find_extrema<T, A>, maps.grid(), block, 0, device.stream(), x, parts.data(), maps.pixels, maps.tiles);
    launch(normalize_tile<T, A>, maps.grid(), block, 0, device.stream(), x, parts.data(), y, maps.pixels, maps.tiles,
           A(eps));
  });
  return result;
}

Tensor normalize_cam_bwd(const Tensor& grad, const Tensor& cam, double eps) {
  const Maps maps(cam);
  WSSS_CHECK(sizes_of(grad) == sizes_of(cam) && grad.scalar_type() == cam.scalar_type(),
             "normalize_cam: the gradient must have the shape and dtype of cam");
  const OnDevice device(cam);
  const Tensor given = dense(cam), cotangent = dense(grad);
  Tensor result = new_empty(cam, sizes_of(cam));
  if (!maps.count) return result;
  for_cuda_type("normalize_cam", cam, [&](auto tag) {
    using T = decltype(tag);
    using A = accumulator_t<T>;
    const T *g = in<T>(cotangent), *x = in<T>(given);
    T* y = out<T>(result);
    const dim3 block(kThreads);
    if (maps.tiles == 1) {
      WSSS_PATH("normalize_cam.cuda.block.bwd");
      launch(normalize_grad_block<T, A>, maps.grid(), block, 0, device.stream(), g, x, y, maps.pixels, A(eps));
      return;
    }
    WSSS_PATH("normalize_cam.cuda.tiles.bwd");
    const Parts<Extrema<A>> parts(cam, maps);
    const Parts<Sums> sums(cam, maps);
    launch(find_extrema<T, A>, maps.grid(), block, 0, device.stream(), x, parts.data(), maps.pixels, maps.tiles);
    launch(sum_tile<T, A>, maps.grid(), block, 0, device.stream(), g, x, parts.data(), sums.data(), maps.pixels,
           maps.tiles, A(eps));
    launch(normalize_grad_tile<T, A>, maps.grid(), block, 0, device.stream(), g, x, parts.data(), sums.data(), y,
           maps.pixels, maps.tiles, A(eps));
  });
  return result;
}

}  // namespace
}  // namespace wsss::cam

WSSS_CUDA_LIBRARY(m) {
  m.impl("normalize_cam_fwd", TORCH_BOX(&wsss::cam::normalize_cam_fwd));
  m.impl("normalize_cam_bwd", TORCH_BOX(&wsss::cam::normalize_cam_bwd));
}
