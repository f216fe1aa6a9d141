// The resize and weighted sum of fuse_cams for CUDA tensors: arguments, launches, registration.
#include "ops/cam/fuse_checks.h"
#include "ops/cam/fuse_kernels.cuh"
#include "wsss/cuda_tensor.h"

namespace wsss::cam {
namespace {

constexpr int kFuseThreads = 256;

void check(const Tensor& map, const Tensor& first, int64_t height, int64_t width) {
  check_map(map, first, height, width);
  for (const int64_t side : {map.size(2), map.size(3), height, width})
    WSSS_CHECK(side < (1 << 30), "fuse_cams: a side must be below 2^30, got ", side);
}

dim3 grid_for(int64_t threads) {
  const int64_t blocks = blocks_for(threads, kFuseThreads);
  WSSS_CHECK(blocks < (int64_t(1) << 31), "fuse_cams: the maps are too large");
  return dim3(static_cast<unsigned>(blocks));
}

// `present`, B×K, scales the sum of each plane.
Tensor fwd(std::vector<Tensor> maps, std::vector<double> weights, std::optional<Tensor> present, int64_t height,
           int64_t width) {
  WSSS_CHECK(!maps.empty() && maps.size() == weights.size() && maps.size() <= size_t(kMostMaps), "fuse_cams: 1 to ",
             kMostMaps, " maps and one weight per map expected");
  const OnDevice device(maps[0]);
  const std::optional<Tensor> gate = checked_gate(present, maps[0]);
  std::vector<Tensor> given;
  for (const Tensor& map : maps) {
    check(map, maps[0], height, width);
    given.push_back(dense(map));
  }
  const int64_t planes = maps[0].size(0) * maps[0].size(1);
  Tensor result = new_empty(maps[0], std::vector<int64_t>{maps[0].size(0), maps[0].size(1), height, width});
  if (!planes) return result;
  WSSS_PATH("fuse_cams.cuda.fwd");
  for_cuda_type("fuse_cams", maps[0], [&](auto tag) {
    using T = decltype(tag);
    Sources<T> sources{int(given.size()), gate ? in<T>(*gate) : nullptr, {}};
    for (size_t i = 0; i < given.size(); ++i)
      sources.of[i] = {in<T>(given[i]), int(given[i].size(2)), int(given[i].size(3)), weights[i]};
    launch(resize_sum<T, accumulator_t<T>>, grid_for(planes * height * width), dim3(kFuseThreads), 0, device.stream(),
           sources, out<T>(result), planes, int(height), int(width));
  });
  return result;
}

// The gradient of one map of h×w.
Tensor bwd(const Tensor& grad, double weight, std::optional<Tensor> present, int64_t h, int64_t w) {
  check(grad, grad, h, w);
  const std::optional<Tensor> gate = checked_gate(present, grad);
  const OnDevice device(grad);
  const Tensor given = dense(grad);
  const int64_t cells = grad.size(0) * grad.size(1) * h * w;
  Tensor result = new_empty(grad, std::vector<int64_t>{grad.size(0), grad.size(1), h, w});
  if (!cells) return result;
  WSSS_PATH("fuse_cams.cuda.bwd");
  for_cuda_type("fuse_cams", grad, [&](auto tag) {
    using T = decltype(tag);
    launch(resize_adjoint<T, accumulator_t<T>>, grid_for(cells * kWarpThreads), dim3(kFuseThreads), 0, device.stream(),
           in<T>(given), out<T>(result), cells, int(h), int(w), int(grad.size(2)), int(grad.size(3)), weight,
           gate ? in<T>(*gate) : nullptr);
  });
  return result;
}

}  // namespace
}  // namespace wsss::cam

WSSS_CUDA_LIBRARY(m) {
  m.impl("fuse_cams_fwd", TORCH_BOX(&wsss::cam::fwd));
  m.impl("fuse_cams_bwd", TORCH_BOX(&wsss::cam::bwd));
}
