// Box masks and components of random maps against a flood fill, at the level that WSSS_CPU_CAPABILITY asks for. Buffers
// end where the data ends, so that the sanitizers see every read and write beyond it.
#include <algorithm>
#include <cstdio>
#include <random>
#include <vector>

#include "wsss/buffer.h"
#include "wsss/cpu_level.h"
#include "ops/box_mask/box_mask_math.h"

namespace wsss {
namespace {

#define WSSS_CPU_KERNELS "ops/box_mask/box_mask_cpu.inc"
#include "wsss/cpu_kernels.h"

struct Truth {
  std::vector<int32_t> label;
  std::vector<float> mask;
};

Truth flood(const std::vector<uint8_t>& map, int h, int w, int connectivity) {
  Truth truth{std::vector<int32_t>(map.size()), std::vector<float>(map.size())};
  int32_t count = 0;
  for (int start = 0; start < h * w; ++start) {
    if (!map[start] || truth.label[start]) continue;
    int top = h, bottom = -1, left = w, right = -1;
    std::vector<int> open{start};
    truth.label[start] = ++count;
    while (!open.empty()) {
      const int y = open.back() / w, x = open.back() % w;
      open.pop_back();
      top = std::min(top, y), bottom = std::max(bottom, y), left = std::min(left, x), right = std::max(right, x);
      for (int dy = -1; dy <= 1; ++dy)
        for (int dx = -1; dx <= 1; ++dx) {
          const int v = y + dy, u = x + dx;
          if ((connectivity == 4 && dy && dx) || v < 0 || v >= h || u < 0 || u >= w) continue;
          if (!map[v * w + u] || truth.label[v * w + u]) continue;
          truth.label[v * w + u] = count;
          open.push_back(v * w + u);
        }
    }
    for (int y = top; y <= bottom; ++y) std::fill_n(truth.mask.begin() + y * w + left, right - left + 1, 1.f);
  }
  return truth;
}

template <class T, class F>
bool same_boxes(const std::vector<uint8_t>& map, int h, int w, const Truth& truth, const F& kernel) {
  const std::vector<T> cam(map.begin(), map.end());
  std::vector<T> mask(map.size(), T(-1));
  kernel(cam.data(), 1, h, w, 0.4, false, mask.data());
  return std::equal(mask.begin(), mask.end(), truth.mask.begin());
}

bool check(int h, int w, double share, std::mt19937& random) {
  std::vector<uint8_t> map(size_t(h) * w);
  for (auto& pixel : map) pixel = std::uniform_real_distribution<>(0, 1)(random) < share;
  bool good = true;
  for (int connectivity : {4, 8}) {
    const Truth truth = flood(map, h, w, connectivity);
    std::vector<int32_t> label(map.size(), -1);
    WSSS_CPU(label_maps)(map.data(), 1, h, w, connectivity, label.data());
    good &= label == truth.label;
    if (connectivity == 4) continue;
    good &= same_boxes<float>(map, h, w, truth, WSSS_CPU(box_masks_f32));
    good &= same_boxes<double>(map, h, w, truth, WSSS_CPU(box_masks_f64));
  }
  if (!good) std::printf("FAILED: %d×%d, share %g\n", h, w, share);
  return good;
}

}  // namespace
}  // namespace wsss

int main() {
  std::mt19937 random(1);
  int failures = 0, checks = 0;
  for (int w : {1, 2, 5, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200})
    for (int h : {1, 2, 3, 17, 64})
      for (double share : {0.0, 0.1, 0.4, 0.6, 0.9, 1.0})
        for (int repeat = 0; repeat < 3; ++repeat, ++checks) failures += !wsss::check(h, w, share, random);
  std::printf("%d maps, %d failures, level %s\n", checks, failures, wsss::cpu_level_name(wsss::cpu_level()));
  return failures != 0;
}
