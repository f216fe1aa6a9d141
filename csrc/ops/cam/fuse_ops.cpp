// The resize and weighted sum of fuse_cams: arguments, interpolation tables, one thread per plane, registration.
#include "ops/cam/fuse_checks.h"
#include "ops/cam/fuse_math.h"

namespace wsss {
namespace cam {
namespace {

// One map of a plane and how it is read.
template <class T>
struct Source {
  const T* map;
  int64_t height, width;
  T weight;
  const Tap *row, *column;
};

#define WSSS_CPU_KERNELS "ops/cam/fuse_cpu.inc"
#include "wsss/cpu_kernels.h"

auto resize_sum(float) { return WSSS_CPU(resize_sum_f32); }
auto resize_sum(double) { return WSSS_CPU(resize_sum_f64); }
auto resize_adjoint(float) { return WSSS_CPU(resize_adjoint_f32); }
auto resize_adjoint(double) { return WSSS_CPU(resize_adjoint_f64); }

std::vector<Tap> taps(int64_t from, int64_t to) {
  std::vector<Tap> all;
  for (int64_t i = 0; i < to; ++i) all.push_back(resize_tap(i, from, to));
  return all;
}

struct Axes {
  std::vector<Tap> row, column;
};

// `present`, B×K, scales the weights of each plane.
Tensor fwd(std::vector<Tensor> maps, std::vector<double> weights, std::optional<Tensor> present, int64_t height,
           int64_t width) {
  WSSS_CHECK(!maps.empty() && maps.size() == weights.size(), "fuse_cams: one weight per map expected");
  const std::optional<Tensor> gate = checked_gate(present, maps[0]);
  std::vector<Tensor> given;
  std::vector<Axes> axes;
  int64_t rows = 0;
  for (const Tensor& map : maps) {
    check_map(map, maps[0], height, width);
    given.push_back(dense(map));
    axes.push_back({taps(map.size(2), height), taps(map.size(3), width)});
    rows += map.size(2);
  }
  Tensor result = wsss::new_empty(maps[0], std::vector<int64_t>{maps[0].size(0), maps[0].size(1), height, width});
  WSSS_PATH("fuse_cams.fwd");
  for_float_type("fuse_cams", maps[0], [&](auto tag) {
    using T = decltype(tag);
    T* y = out<T>(result);
    parallel_for(0, maps[0].size(0) * maps[0].size(1), 1, [&](int64_t begin, int64_t end) {
      Buffer<T> columns(rows * width);
      std::vector<Source<T>> sources;
      for (size_t i = 0; i < given.size(); ++i)
        sources.push_back(
            {nullptr, given[i].size(2), given[i].size(3), T(weights[i]), axes[i].row.data(), axes[i].column.data()});
      for (int64_t plane = begin; plane < end; ++plane) {
        for (size_t i = 0; i < given.size(); ++i) {
          sources[i].map = in<T>(given[i]) + plane * sources[i].height * sources[i].width;
          if (gate) sources[i].weight = T(weights[i]) * in<T>(*gate)[plane];
        }
        resize_sum(tag)(sources.data(), int64_t(sources.size()), height, width, columns.data(),
                        y + plane * height * width);
      }
    });
  });
  return result;
}

// The gradient of one map of h×w.
Tensor bwd(const Tensor& grad, double weight, const std::optional<Tensor>& present, int64_t h, int64_t w) {
  check_map(grad, grad, h, w);
  const std::optional<Tensor> gate = checked_gate(present, grad);
  const Tensor given = dense(grad);
  const int64_t height = grad.size(2), width = grad.size(3);
  const Axes axes{taps(h, height), taps(w, width)};
  Tensor result = wsss::new_empty(grad, std::vector<int64_t>{grad.size(0), grad.size(1), h, w});
  WSSS_PATH("fuse_cams.bwd");
  for_float_type("fuse_cams", grad, [&](auto tag) {
    using T = decltype(tag);
    const T* g = in<T>(given);
    T* to = out<T>(result);
    parallel_for(0, grad.size(0) * grad.size(1), 1, [&](int64_t begin, int64_t end) {
      Buffer<T> columns(h * width);
      Source<T> source{nullptr, h, w, T(weight), axes.row.data(), axes.column.data()};
      for (int64_t plane = begin; plane < end; ++plane) {
        if (gate) source.weight = T(weight) * in<T>(*gate)[plane];
        resize_adjoint(tag)(source, height, width, g + plane * height * width, columns.data(), to + plane * h * w);
      }
    });
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(wsss, m) {
  m.def("fuse_cams_fwd(Tensor[] maps, float[] weights, Tensor? present, int height, int width) -> Tensor");
  m.def("fuse_cams_bwd(Tensor grad, float weight, Tensor? present, int height, int width) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(wsss, CPU, m) {
  m.impl("fuse_cams_fwd", TORCH_BOX(&fwd));
  m.impl("fuse_cams_bwd", TORCH_BOX(&bwd));
}

}  // namespace cam
}  // namespace wsss
