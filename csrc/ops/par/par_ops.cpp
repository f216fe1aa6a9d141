// Operators of PAR: arguments, blocks of classes, threads, registration.
#include "wsss/tensor.h"

namespace wsss {
namespace par {

// One image: sizes, padding, and where each neighbour lies.
struct ParShape {
  int64_t channels, height, width, blocks, left, stride, above;
  int neighbours;
  bool pamr;
  double w1;
  const int64_t* offsets;  // [height][neighbours], in elements of a padded plane, rows clamped
  const int64_t *dy, *dx;  // [neighbours]
};

constexpr int64_t kMostClasses = 6, kLanes = 16, kRows = 4;

template <class T, class W>
struct ParKernels {
  void (*pad)(const ParShape&, const T*, T*, int64_t, int64_t);
  void (*weights)(const ParShape&, const T*, const T*, T*, uint16_t*, float*, T*, int64_t, int64_t);
  void (*adjoint)(const ParShape&, int64_t, const T*, const W*, T*, T*, int64_t, int64_t);
  void (*iterate[kMostClasses])(const ParShape&, const T*, const W*, const float*, T*, int64_t, int64_t);
};

#define WSSS_CPU_KERNELS "ops/par/par_cpu.inc"
#include "wsss/cpu_kernels.h"

static auto kernels(float, float) { return WSSS_CPU(par_kernels_f32)(); }
static auto kernels(float, uint16_t) { return WSSS_CPU(par_kernels_f16)(); }
static auto kernels(double, double) { return WSSS_CPU(par_kernels_f64)(); }

struct Options {
  std::vector<int64_t> dilations;
  int64_t num_iter;
  bool pamr;
  double w1, w2, w3;
};

// softmax over the neighbours of the distances, times w3; zeros for "pamr".
static std::vector<double> position_term(const Options& o) {
  std::vector<double> d, w;
  for (int64_t dilation : o.dilations)
    for (int k = 0; k < 8; ++k)
      d.push_back(double(dilation) * (k == 1 || k == 3 || k == 4 || k == 6 ? 1.0 : std::sqrt(2.0)));
  double mean = 0, square = 0, sum = 0, largest = -std::numeric_limits<double>::infinity();
  for (double x : d) mean += x / double(d.size());
  for (double x : d) square += (x - mean) * (x - mean);
  const double deviation = std::sqrt(square / double(d.size() - 1));
  for (double x : d) w.push_back(-(x / (deviation + 1e-8) / o.w2) * (x / (deviation + 1e-8) / o.w2));
  for (double x : w) largest = std::max(largest, x);
  for (double& x : w) sum += x = std::exp(x - largest);
  for (double& x : w) x = o.pamr ? 0.0 : o.w3 * x / sum;
  return w;
}

// The weights of one image and everything that an iteration needs.
template <class T, class W>
class Image {
 public:
  Image(const T* image, int64_t channels, int64_t height, int64_t width, const Options& o)
      : kernels_(kernels(T{}, W{})) {
    const int directions[8][2] = {{-1, -1}, {-1, 0}, {-1, 1}, {0, -1}, {0, 1}, {1, -1}, {1, 0}, {1, 1}};
    int64_t reach = 0, above = 0;
    for (int64_t d : o.dilations)
      for (const auto& v : directions) {
        // beyond the map every coordinate clamps to the border: a longer step changes nothing
        dy_.push_back(v[0] * std::min(d, height - 1));
        dx_.push_back(v[1] * std::min(d, width - 1));
        above = std::max(above, dy_.back());
        reach = std::max(reach, dx_.back());
      }
    const int64_t blocks = (width + kLanes - 1) / kLanes, pad = (reach + kLanes - 1) / kLanes * kLanes;
    s = {channels, height, width,   blocks,     pad,       2 * pad + blocks * kLanes, above, int(dy_.size()),
         o.pamr,   o.w1,   nullptr, dy_.data(), dx_.data()};
    offsets_ = Buffer<int64_t>(height * s.neighbours);
    for (int64_t y = 0; y < height; ++y)
      for (int k = 0; k < s.neighbours; ++k)
        offsets_[y * s.neighbours + k] =
            (std::min(std::max(y + dy_[k], int64_t(0)), height - 1) - y) * s.stride + dx_[k];
    s.offsets = offsets_.data();
    compute_weights(image, position_term(o));
  }

  // Classes in blocks, so that the padded planes stay small beside the weights.
  int64_t classes_at_once(int64_t budget_planes, int64_t plane) const {
    const int64_t bytes = std::max(budget_planes * 2 * s.height * s.width, int64_t(1) << 20);
    return std::min<int64_t>(std::max<int64_t>(bytes / (plane * int64_t(sizeof(T))), 1), kMostClasses);
  }

  void forward(const T* mask, T* result, int64_t classes, int64_t num_iter) {
    const int64_t most = classes_at_once(budget(), s.height * s.stride), parts = (classes + most - 1) / most;
    Buffer<T> planes(std::min(most, classes) * s.height * s.stride);
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t c0 = classes * part / parts, count = classes * (part + 1) / parts - c0;
      const auto iterate = kernels_.iterate[count - 1];
      T* to = result + c0 * s.height * s.width;
      for (int64_t t = 0; t < num_iter; ++t) {
        const T* from = t ? to : mask + c0 * s.height * s.width;
        parallel_for(0, count * s.height, 4 * kRows,
                     [&](int64_t b, int64_t e) { kernels_.pad(s, from, planes.data(), b, e); });
        parallel_for(0, s.height, kRows, [&](int64_t b, int64_t e) {
          iterate(s, planes.data(), weights_.data(), correction_.data(), to, b, e);
        });
      }
    }
  }

  void backward(const T* grad, T* result, int64_t classes, int64_t num_iter) {
    const int64_t rows = s.height + 2 * s.above, padded = s.blocks * kLanes, width = s.width;
    const int64_t most = classes_at_once(budget(), rows * width + s.height * padded);
    Buffer<T> target(std::min(most, classes) * rows * width), source(std::min(most, classes) * s.height * padded);
    for (int64_t c0 = 0; c0 < classes; c0 += most) {
      const int64_t count = std::min(most, classes - c0);
      for (int64_t t = 0; t <= num_iter; ++t) {
        const bool last = t == num_iter;
        parallel_for(0, count * s.height, 4 * kRows, [&](int64_t b, int64_t e) {
          for (int64_t r = b; r < e; ++r) {
            const T* from = t ? target.data() + (r / s.height * rows + s.above + r % s.height) * width
                              : grad + (c0 * s.height + r) * width;
            T* to = last ? result + (c0 * s.height + r) * width : source.data() + r * padded;
            fold(from, to, r % s.height, t > 0);
            if (last) continue;
            std::fill(to + width, to + padded, T(0));
            if (correction_.size())
              for (int64_t x = 0; x < width; ++x) to[x] *= T(correction_[r % s.height * padded + x]);
          }
        });
        if (last) break;
        parallel_for(0, rows, kRows, [&](int64_t b, int64_t e) {
          Buffer<T> row(s.stride);
          kernels_.adjoint(s, count, source.data(), weights_.data(), target.data(), row.data(), b, e);
        });
      }
    }
  }

 private:
  // float16-plane equivalents left for iteration buffers of 110 (60): 96 are float32 weights, 50 float16 weights.
  static int64_t budget() { return sizeof(W) == 2 ? 10 : 14; }

  // A row of the target; the first and last one also take what fell above and below the map, in a fixed order.
  void fold(const T* from, T* to, int64_t y, bool outside) const {
    std::copy(from, from + s.width, to);
    if (!outside) return;
    for (int64_t r = 1; y == 0 && r <= s.above; ++r)
      for (int64_t x = 0; x < s.width; ++x) to[x] += from[x - r * s.width];
    for (int64_t r = 1; y == s.height - 1 && r <= s.above; ++r)
      for (int64_t x = 0; x < s.width; ++x) to[x] += from[x + r * s.width];
  }

  void compute_weights(const T* image, const std::vector<double>& term) {
    const bool half = sizeof(W) == 2;
    const std::vector<T> position(term.begin(), term.end());
    weights_ = Buffer<W>(s.height * s.blocks * s.neighbours * kLanes);
    if (half) correction_ = Buffer<float>(s.height * s.blocks * kLanes);
    Buffer<T> planes(s.channels * s.height * s.stride);
    parallel_for(0, s.channels * s.height, 4 * kRows,
                 [&](int64_t b, int64_t e) { kernels_.pad(s, image, planes.data(), b, e); });
    parallel_for(0, s.height, kRows, [&](int64_t b, int64_t e) {
      Buffer<T> scratch((s.channels + 2) * (s.neighbours + 1) * kLanes);
      T* full = half ? nullptr : reinterpret_cast<T*>(weights_.data());
      uint16_t* rounded = half ? reinterpret_cast<uint16_t*>(weights_.data()) : nullptr;
      kernels_.weights(s, planes.data(), position.data(), full, rounded, correction_.data(), scratch.data(), b, e);
    });
  }

  ParKernels<T, W> kernels_;
  std::vector<int64_t> dy_, dx_;
  Buffer<int64_t> offsets_;
  Buffer<W> weights_;
  Buffer<float> correction_;

 public:
  ParShape s;
};

template <class T, class W>
static void run(const Tensor& image, const Tensor& mask, const Tensor& result, const Options& o, bool backward) {
  const int64_t q = image.size(1), h = image.size(2), w = image.size(3), c = mask.size(1);
  for (int64_t b = 0; b < image.size(0) && c > 0; ++b) {
    Image<T, W> one(in<T>(image) + b * q * h * w, q, h, w, o);
    const T* from = in<T>(mask) + b * c * h * w;
    T* to = out<T>(result) + b * c * h * w;
    backward ? one.backward(from, to, c, o.num_iter) : one.forward(from, to, c, o.num_iter);
  }
}

static Tensor apply(const char* op, const Tensor& image, const Tensor& mask, const Options& o, bool exact,
                    bool backward) {
  WSSS_CHECK(image.dim() == 4 && mask.dim() == 4, op, ": image and mask must have 4 dimensions");
  WSSS_CHECK(image.size(0) == mask.size(0) && image.size(2) == mask.size(2) && image.size(3) == mask.size(3), op,
             ": image and mask must agree");
  WSSS_CHECK(image.scalar_type() == mask.scalar_type(), op, ": image and mask must have one dtype");
  WSSS_CHECK(!o.dilations.empty() && o.num_iter >= 0 && image.size(1) > 0, op,
             ": no dilation, no channel, or num_iter < 0");
  for (int64_t d : o.dilations) WSSS_CHECK(d >= 1, op, ": dilation ", d, " < 1");
  const Tensor i = torch::stable::contiguous(image), m = torch::stable::contiguous(mask);
  if (o.num_iter == 0) return torch::stable::clone(m);
  Tensor result = torch::stable::empty_like(m);
  if (i.scalar_type() == ScalarType::Double) {
    WSSS_PATH("par.cpu.float64");
    run<double, double>(i, m, result, o, backward);
  } else if (i.scalar_type() != ScalarType::Float) {
    fail("wsss_kernels: ", op, ": float32 or float64 expected, got ", torch::headeronly::toString(i.scalar_type()));
  } else if (exact) {
    WSSS_PATH("par.cpu.exact");
    run<float, float>(i, m, result, o, backward);
  } else {
    WSSS_PATH("par.cpu.half_weights");
    run<float, uint16_t>(i, m, result, o, backward);
  }
  return result;
}

static Tensor fwd(const Tensor& image, const Tensor& mask, std::vector<int64_t> dilations, int64_t num_iter, bool pamr,
                  double w1, double w2, double w3, bool exact) {
  return apply("par_fwd", image, mask, {std::move(dilations), num_iter, pamr, w1, w2, w3}, exact, false);
}

static Tensor bwd(const Tensor& image, const Tensor& grad, std::vector<int64_t> dilations, int64_t num_iter, bool pamr,
                  double w1, double w2, double w3, bool exact) {
  return apply("par_bwd", image, grad, {std::move(dilations), num_iter, pamr, w1, w2, w3}, exact, true);
}

}  // namespace par
}  // namespace wsss

STABLE_TORCH_LIBRARY_FRAGMENT(wsss, m) {
  m.def(
      "par_fwd(Tensor image, Tensor mask, int[] dilations, int num_iter, bool pamr, float w1, float w2, float w3, bool "
      "exact) -> Tensor");
  m.def(
      "par_bwd(Tensor image, Tensor grad, int[] dilations, int num_iter, bool pamr, float w1, float w2, float w3, bool "
      "exact) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(wsss, CPU, m) {
  m.impl("par_fwd", TORCH_BOX(&wsss::par::fwd));
  m.impl("par_bwd", TORCH_BOX(&wsss::par::bwd));
}
