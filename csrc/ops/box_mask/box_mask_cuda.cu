// Box masks and connected components of CUDA tensors: which kernels run, on how many maps at a time, registration.
#include "ops/box_mask/box_mask_kernels.cuh"

#include "ops/box_mask/maps.h"
#include "wsss/cuda_tensor.h"

namespace wsss::box_mask {
namespace {

constexpr int64_t kBlockPixels = 128 * 128, kBlockSide = 512;  // of a map in shared memory
constexpr int64_t kPixelsTogether = 1 << 22;                   // of the large maps that share a workspace
constexpr int kThreads = 256, kWarps = kThreads / kWarpThreads;

Size size_of(const Maps& maps) { return {int(maps.h), int(maps.w)}; }

bool fits_block(const Maps& maps, size_t shared_bytes) {
  return maps.pixels() <= kBlockPixels && maps.h <= kBlockSide && maps.w <= kBlockSide &&
         maps.count < (int64_t(1) << 31) && shared_bytes <= max_shared_bytes();
}

// body(first, count): large maps in groups, blockIdx.y of a launch.
template <class F>
void for_groups(const Maps& maps, int64_t most, const F& body) {
  const int64_t together = std::min<int64_t>(most, 65535);
  for (int64_t first = 0; first < maps.count; first += together) body(first, std::min(together, maps.count - first));
}

// From runs to numbers in every foreground cell.
void number_components(int* label, int* counts, Size s, unsigned maps, bool corners, cudaStream_t stream) {
  const unsigned tiles = unsigned(blocks_for(s.pixels(), kTilePixels));
  launch(join_maps, dim3(unsigned(blocks_for(s.segments(), kWarps)), maps), dim3(kThreads), 0, stream, label, s,
         corners);
  launch(find_roots, dim3(tiles, maps), dim3(kThreads), 0, stream, label, counts, s);
  launch(sum_counts, dim3(maps), dim3(kWarpThreads), 0, stream, counts, int(tiles));
  launch(number_maps, dim3(tiles, maps), dim3(kThreads), 0, stream, label, counts, s);
  launch(spread_numbers, dim3(unsigned(blocks_for(s.pixels(), kThreads)), maps), dim3(kThreads), 0, stream, label,
         s.pixels());
}

template <class T>
void mask_large(const Tensor& like, const Maps& maps, const T* cam, T* mask, double threshold, bool clip,
                cudaStream_t stream) {
  const Size s = size_of(maps);
  const int64_t pixels = s.pixels(), tiles = blocks_for(pixels, kTilePixels);
  const int64_t together = std::min(maps.count, std::max<int64_t>(1, kPixelsTogether / pixels));
  const auto cells = [&](int64_t each) { return new_empty(like, {together, each}, ScalarType::Int); };
  const Tensor highest = cells(1), label = cells(pixels), counts = cells(tiles), boxes = cells(4 * int64_t(s.most()));
  int *top = out<int>(highest), *at = out<int>(label), *count = out<int>(counts), *box = out<int>(boxes);
  for_groups(maps, together, [&](int64_t first, int64_t many) {
    const T* from = cam + first * pixels;
    const auto grid = [&](int64_t n) { return dim3(unsigned(n), unsigned(many)); };
    const dim3 segments = grid(blocks_for(s.segments(), kWarps)), threads(kThreads);
    check_cuda(cudaMemsetAsync(top, 0, size_t(many) * sizeof(int), stream), "box_mask");
    check_cuda(cudaMemsetAsync(box, 0x7f, size_t(many) * 4 * size_t(s.most()) * sizeof(int), stream), "box_mask");
    launch(find_highest<T>, grid(std::min<int64_t>(blocks_for(pixels, 8 * kThreads), 64)), threads, 0, stream, from,
           top, int(pixels));
    launch(start_cam<T>, segments, threads, 0, stream, from, top, at, s, threshold);
    number_components(at, count, s, unsigned(many), true, stream);
    launch(find_boxes, segments, threads, 0, stream, at, box, s);
    check_cuda(cudaMemsetAsync(at, 0, size_t(many) * size_t(pixels) * sizeof(int), stream), "box_mask");
    launch(mark_corners, grid(blocks_for(s.most(), kThreads)), threads, 0, stream, box, at, s);
    launch(sum_rows, grid(blocks_for(s.height, kWarps)), threads, 0, stream, at, s);
    launch(paint<T>, grid(s.across()), dim3(kWarpThreads * kColumnGroups), 0, stream, at, mask + first * pixels, s,
           clip);
  });
}

Tensor box_mask_fwd(const Tensor& cam, double threshold, bool clip) {
  const Maps maps("box_mask", cam);
  WSSS_CHECK(std::isfinite(threshold), "box_mask: threshold must be finite, got ", threshold);
  const OnDevice device(cam);
  const Tensor given = dense(cam);
  Tensor mask = new_empty(cam, sizes_of(cam));
  if (!maps.count) return mask;
  const Size s = size_of(maps);
  for_cuda_type("box_mask", cam, [&](auto tag) {
    using T = decltype(tag);
    const T* x = in<T>(given);
    T* y = out<T>(mask);
    if (maps.h <= kWarpThreads && maps.w <= kWarpThreads) {
      WSSS_PATH("box_mask.cuda.warp");
      launch(box_mask_warp<T>, dim3(unsigned(blocks_for(maps.count, kWarpMaps))), dim3(kWarpMaps * kWarpThreads), 0,
             device.stream(), x, y, maps.count, s, threshold, clip);
    } else if (fits_block(maps, box_mask_shared_bytes(s))) {
      WSSS_PATH("box_mask.cuda.block");
      launch(box_mask_block<T>, dim3(unsigned(maps.count)), dim3(kBlockThreads), box_mask_shared_bytes(s),
             device.stream(), x, y, s, threshold, clip);
    } else {
      WSSS_PATH("box_mask.cuda.large");
      mask_large(cam, maps, x, y, threshold, clip, device.stream());
    }
  });
  return mask;
}

// mask: bool or uint8.
Tensor connected_components_fwd(const Tensor& mask, int64_t connectivity) {
  const Maps maps = checked_components(mask, connectivity);
  const OnDevice device(mask);
  const Tensor given = dense(mask);
  Tensor label = new_empty(mask, sizes_of(mask), ScalarType::Int);
  if (!maps.count) return label;
  const Size s = size_of(maps);
  const auto* x = static_cast<const uint8_t*>(given.const_data_ptr());
  int* y = out<int>(label);
  if (fits_block(maps, components_shared_bytes(s))) {
    WSSS_PATH("connected_components.cuda.block");
    launch(components_block<uint8_t>, dim3(unsigned(maps.count)), dim3(kBlockThreads), components_shared_bytes(s),
           device.stream(), x, y, s, connectivity == 8);
    return label;
  }
  WSSS_PATH("connected_components.cuda.large");
  const int64_t pixels = s.pixels();
  const Tensor counts =
      new_empty(mask, {std::min<int64_t>(maps.count, 65535), blocks_for(pixels, kTilePixels)}, ScalarType::Int);
  for_groups(maps, maps.count, [&](int64_t first, int64_t many) {
    const auto grid = [&](int64_t n) { return dim3(unsigned(n), unsigned(many)); };
    int* to = y + first * pixels;
    launch(start_mask<uint8_t>, grid(blocks_for(s.segments(), kWarps)), dim3(kThreads), 0, device.stream(),
           x + first * pixels, to, s);
    number_components(to, out<int>(counts), s, unsigned(many), connectivity == 8, device.stream());
    launch(finish_labels, grid(blocks_for(pixels, kThreads)), dim3(kThreads), 0, device.stream(), to, int(pixels));
  });
  return label;
}

}  // namespace
}  // namespace wsss::box_mask

WSSS_CUDA_LIBRARY(m) {
  m.impl("box_mask_fwd", TORCH_BOX(&wsss::box_mask::box_mask_fwd));
  m.impl("connected_components_fwd", TORCH_BOX(&wsss::box_mask::connected_components_fwd));
}
