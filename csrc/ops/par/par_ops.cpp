// Operators of PAR: arguments, blocks of classes, threads, registration.
#include "ops/par/par_rows.h"
#include "wsss/tensor.h"

namespace wsss {
namespace par {

// One image: sizes, padding, and where each neighbour lies.
struct ParShape {
  int64_t channels, height, width, blocks, left, stride;
  int neighbours;
  bool pamr;
  double w1;
  const int64_t *dy, *dx;  // [neighbours]
};

constexpr int64_t kMostClasses = 6, kLanes = 16, kRows = 4;

template <class T, class W>
struct ParKernels {
  void (*weights)(const ParShape&, const T*, int64_t, const T*, W*, float*, T*, int64_t*, int64_t, int64_t);
  void (*iterate[kMostClasses])(const ParShape&, const T*, const W*, const float*, T*, int64_t*, int64_t, int64_t);
  void (*adjoint[kMostClasses])(const ParShape&, const T*, const W*, const float*, T*, T*, int64_t, int64_t);
};

#define WSSS_CPU_KERNELS "ops/par/par_cpu.inc"
#include "wsss/cpu_kernels.h"

static auto kernels(float, float) { return WSSS_CPU(par_kernels_f32)(); }
static auto kernels(float, uint16_t) { return WSSS_CPU(par_kernels_f16)(); }
static auto kernels(double, double) { return WSSS_CPU(par_kernels_f64)(); }
static RowKernels<double> row_kernels(double, ScalarType) { return WSSS_CPU(par_rows_f64)(); }
static RowKernels<float> row_kernels(float, ScalarType type) {
  return type == ScalarType::Half       ? WSSS_CPU(par_rows_f16)()
         : type == ScalarType::BFloat16 ? WSSS_CPU(par_rows_bf16)()
                                        : WSSS_CPU(par_rows_f32)();
}

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

// One call: its tensors, and what it promises to allocate.
struct Call {
  const Tensor &image, &mask, &result;  // backward: image, gradient of the result, gradient of the mask
  const Options& options;
  int64_t height, width;
  bool exact;

  // Bytes of 110 (60) float16 planes; float64 takes twice that.
  int64_t promise() const {
    return (exact ? 110 : 60) * (image.scalar_type() == ScalarType::Double ? 4 : 2) * height * width;
  }
};

// The weights of one image after another, and the iterations with them.
template <class T, class W>
class Refinement {
 public:
  explicit Refinement(const Call& call)
      : call_(call),
        kernels_(kernels(T{}, W{})),
        image_(call.image, row_kernels(T{}, call.image.scalar_type()), call.height, call.width),
        mask_(call.mask, row_kernels(T{}, call.mask.scalar_type()), call.height, call.width),
        writer_(row_kernels(T{}, call.result.scalar_type())) {
    const Options& o = call.options;
    const int directions[8][2] = {{-1, -1}, {-1, 0}, {-1, 1}, {0, -1}, {0, 1}, {1, -1}, {1, 0}, {1, 1}};
    int64_t reach = 0;
    for (int64_t d : o.dilations)
      for (const auto& v : directions) {
        // beyond the map every coordinate clamps to the border: a longer step changes nothing
        dy_.push_back(v[0] * std::min(d, call.height - 1));
        dx_.push_back(v[1] * std::min(d, call.width - 1));
        reach = std::max(reach, dx_.back());
      }
    const int64_t blocks = (call.width + kLanes - 1) / kLanes, pad = (reach + 7) / 8 * 8;
    s_ = {call.image.size(1), call.height, call.width, blocks,     pad,       2 * pad + blocks * kLanes,
          int(dy_.size()),    o.pamr,      o.w1,       dy_.data(), dx_.data()};
    weights_ = Buffer<W>(s_.height * blocks * s_.neighbours * kLanes);
    if (kRounds) correction_ = Buffer<float>(s_.height * blocks * kLanes);
  }

  void run(bool backward) {
    for (int64_t b = 0; b < call_.mask.size(0); ++b) {
      if (call_.options.num_iter > 0) compute_weights(b);
      backward ? adjoint(b) : forward(b);
    }
  }

 private:
  static constexpr bool kRounds = sizeof(W) != sizeof(T);

  // Bytes that the promise has room for beside the weights and each thread's elements and offsets. Small maps, of which
  // padding and scratch are the greater part, get a room of at least this size.
  int64_t room(int64_t per_thread) const {
    const int64_t stored = weights_.size() * int64_t(sizeof(W)) + correction_.size() * int64_t(sizeof(float));
    const int64_t tables = 16 * (s_.height + s_.width);  // of a resizing
    const int64_t own = per_thread * int64_t(sizeof(T)) + s_.neighbours * int64_t(sizeof(int64_t));
    return std::max(call_.promise() - stored - tables - torch::stable::get_num_threads() * own, int64_t(1) << 16);
  }

  // Classes in blocks: as many as there is room for, in parts of about one size.
  template <class F>
  void for_class_blocks(int64_t bytes_per_class, const F& body) const {
    const int64_t fit = room(kMostClasses * s_.stride) / bytes_per_class, classes = call_.mask.size(1);
    const int64_t most = std::min(std::max<int64_t>(fit, 1), kMostClasses);
    const int64_t parts = (classes + most - 1) / most;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t first = classes * part / parts;
      body(first, classes * (part + 1) / parts - first);
    }
  }

  // Rows [top, bottom) of planes of a tensor to [row][plane][stride]; after(row, y) completes each, in parallel.
  template <class F>
  void read(const Planes<T>& planes, int64_t b, int64_t first, int64_t count, int64_t top, int64_t bottom, T* to,
            int64_t stride, const F& after) {
    parallel_for(top, bottom, kRows, [&](int64_t begin, int64_t end) {
      Buffer<T> scratch(planes.scratch());
      for (int64_t r = begin * count; r < end * count; ++r) {
        T* row = to + (r - top * count) * stride;
        planes.row(b, first + r % count, r / count, row, scratch.data());
        after(row, r / count);
      }
    });
  }

  // The clamped border on both sides of a row that stands in its padded plane.
  void pad(T* row) const {
    std::fill(row - s_.left, row, row[0]);
    std::fill(row + s_.width, row - s_.left + s_.stride, row[s_.width - 1]);
  }

  // From the image in bands of rows, with the rows in reach of them: as high as there is room for.
  void compute_weights(int64_t b) {
    const std::vector<double> term = position_term(call_.options);
    const std::vector<T> position(term.begin(), term.end());
    const int64_t row = s_.channels * s_.stride, reach = *std::max_element(dy_.begin(), dy_.end());
    const int64_t per_thread = (s_.channels + 1) * (s_.neighbours + 1) * kLanes;
    const int64_t fit = room(per_thread) / (row * int64_t(sizeof(T)));
    const int64_t band = fit >= s_.height ? s_.height : std::max(fit - 2 * reach, std::max(reach, kRows));
    Buffer<T> planes(std::min(band + 2 * reach, s_.height) * row);
    for (int64_t top = 0; top < s_.height; top += band) {
      const int64_t bottom = std::min(top + band, s_.height), first = std::max<int64_t>(top - reach, 0);
      read(image_, b, 0, s_.channels, first, std::min(bottom + reach, s_.height), planes.data() + s_.left, s_.stride,
           [&](T* to, int64_t) { pad(to); });
      parallel_for(top, bottom, kRows, [&](int64_t begin, int64_t end) {
        Buffer<T> scratch(per_thread);
        Buffer<int64_t> offsets(s_.neighbours);
        kernels_.weights(s_, planes.data(), first, position.data(), weights_.data(), correction_.data(), scratch.data(),
                         offsets.data(), begin, end);
      });
    }
  }

  void forward(int64_t b) {
    const bool direct = element_bytes(call_.result) == sizeof(T);
    const int64_t plane = s_.height * s_.width, padded = s_.height * s_.stride;
    for_class_blocks((padded + (direct ? 0 : plane)) * int64_t(sizeof(T)), [&](int64_t first, int64_t count) {
      Buffer<T> planes(count * padded), own(direct ? 0 : count * plane);
      T* const to = direct ? static_cast<T*>(result_row(b, first, 0)) : own.data();
      T* const inside = planes.data() + s_.left;
      read(mask_, b, first, count, 0, s_.height, inside, s_.stride, [&](T* row, int64_t) { pad(row); });
      if (call_.options.num_iter == 0) return write(inside, s_.stride, count * s_.stride, b, first, count);
      // A row of the result returns to the planes once nobody needs the old one: while it is in the cache where only
      // this thread needed it, after all threads where a neighbour does.
      const int64_t reach = *std::max_element(dy_.begin(), dy_.end());
      std::vector<char> returned(s_.height);
      const auto give_back = [&](int64_t y) {
        for (int64_t c = 0; c < count; ++c) {
          T* row = inside + (y * count + c) * s_.stride;
          std::copy_n(to + c * plane + y * s_.width, s_.width, row);
          pad(row);
        }
        returned[y] = 1;
      };
      for (int64_t t = 0; t < call_.options.num_iter; ++t) {
        const bool last = t + 1 == call_.options.num_iter;
        std::fill(returned.begin(), returned.end(), char(0));
        parallel_for(0, s_.height, kRows, [&](int64_t begin, int64_t end) {
          Buffer<int64_t> offsets(s_.neighbours);
          int64_t next = begin == 0 ? 0 : begin + reach;
          for (int64_t y = begin; y < end; ++y) {
            kernels_.iterate[count - 1](s_, planes.data(), weights_.data(), correction_.data(), to, offsets.data(), y,
                                        y + 1);
            if (!last && next + reach <= y) give_back(next++);
          }
          if (!last && end == s_.height)
            for (; next < end; ++next) give_back(next);
        });
        if (!last)
          parallel_for(0, s_.height, kRows, [&](int64_t begin, int64_t end) {
            for (int64_t y = begin; y < end; ++y)
              if (!returned[y]) give_back(y);
          });
      }
      if (!direct) write(to, plane, s_.width, b, first, count);
    });
  }

  void adjoint(int64_t b) {
    const int64_t row = s_.blocks * kLanes, plane = s_.height * row;
    for_class_blocks(2 * plane * int64_t(sizeof(T)), [&](int64_t first, int64_t count) {
      Buffer<T> ping(count * plane), pong(count * plane);
      read(mask_, b, first, count, 0, s_.height, ping.data(), row, [&](T* grad, int64_t y) {
        std::fill(grad + s_.width, grad + row, T(0));
        if (kRounds && call_.options.num_iter > 0)
          for (int64_t x = 0; x < s_.width; ++x) grad[x] *= T(correction_[y * row + x]);
      });
      for (int64_t t = call_.options.num_iter; t-- > 0; std::swap(ping, pong))
        parallel_for(0, s_.height, kRows, [&](int64_t begin, int64_t end) {
          Buffer<T> rows(count * s_.stride);
          kernels_.adjoint[count - 1](s_, ping.data(), weights_.data(), t ? correction_.data() : nullptr, pong.data(),
                                      rows.data(), begin, end);
        });
      write(ping.data(), row, count * row, b, first, count);
    });
  }

  // Planes, and rows of a plane, so far apart into the result, which in the backward pass may have the mask's size.
  void write(const T* planes, int64_t apart, int64_t stride, int64_t b, int64_t first, int64_t count) {
    const int64_t height = call_.result.size(2), width = call_.result.size(3);
    const bool resized = height != s_.height || width != s_.width;
    const Axis rows(height, resized ? s_.height : 0), columns(width, resized ? s_.width : 0);
    parallel_for(0, count * height, 4 * kRows, [&](int64_t begin, int64_t end) {
      Buffer<T> sums(resized ? width : 0), blended(resized ? s_.width : 0);
      for (int64_t r = begin; r < end; ++r) {
        const T *plane = planes + r / height * apart, *from = plane + r % height * stride;
        if (resized) {
          resize_adjoint(rows, columns, plane, stride, r % height, sums.data(), blended.data());
          from = sums.data();
        }
        writer_.write(from, width, result_row(b, first, r));
      }
    });
  }

  void* result_row(int64_t b, int64_t c, int64_t r) const {
    const Tensor& t = call_.result;
    return static_cast<char*>(t.mutable_data_ptr()) +
           ((b * t.size(1) + c) * t.size(2) + r) * t.size(3) * element_bytes(t);
  }

  const Call& call_;
  ParKernels<T, W> kernels_;
  const Planes<T> image_, mask_;
  const RowKernels<T> writer_;
  std::vector<int64_t> dy_, dx_;
  Buffer<W> weights_;
  Buffer<float> correction_;
  ParShape s_;
};

static void check(const char* op, const Tensor& image, const Tensor& mask, const std::vector<int64_t>& size,
                  const Options& o) {
  WSSS_CHECK(image.dim() == 4 && mask.dim() == 4, op, ": image and mask must have 4 dimensions");
  WSSS_CHECK(image.size(0) == mask.size(0), op, ": image and mask must agree");
  WSSS_CHECK(size.empty() || (size.size() == 2 && size[0] > 0 && size[1] > 0), op,
             ": size must be a height and a width");
  for (int i = 2; i < 4; ++i) WSSS_CHECK(image.size(i) > 0 && mask.size(i) > 0, op, ": a spatial extent must not be 0");
  WSSS_CHECK(image.scalar_type() == mask.scalar_type(), op, ": image and mask must have one dtype");
  WSSS_CHECK(!o.dilations.empty() && o.num_iter >= 0 && image.size(1) > 0, op,
             ": no dilation, no channel, or num_iter < 0");
  for (int64_t d : o.dilations) WSSS_CHECK(d >= 1, op, ": dilation ", d, " < 1");
}

// size: of the result, where it is not that of the mask (forward) or of the gradient (backward).
static Tensor apply(const char* op, const Tensor& image, const Tensor& mask, const std::vector<int64_t>& size,
                    const Options& o, bool exact, bool backward) {
  check(op, image, mask, size, o);
  const int64_t height = size.empty() ? mask.size(2) : size[0], width = size.empty() ? mask.size(3) : size[1];
  Tensor result = new_empty(mask, std::vector<int64_t>{mask.size(0), mask.size(1), height, width});
  if (result.numel() == 0) return result;
  const Call call{image, mask, result, o, backward ? mask.size(2) : height, backward ? mask.size(3) : width, exact};
  const bool half = mask.scalar_type() == ScalarType::Half || mask.scalar_type() == ScalarType::BFloat16;
  if (mask.scalar_type() == ScalarType::Double) {
    WSSS_PATH("par.cpu.float64");
    Refinement<double, double>(call).run(backward);
  } else if (!half && mask.scalar_type() != ScalarType::Float) {
    fail("wsss_kernels: ", op, ": floating-point tensors expected, got ",
         torch::headeronly::toString(mask.scalar_type()));
  } else if ((half || !exact) && o.w3 >= 0 && o.w3 <= 100) {  // beyond, a position weight may have no float16
    WSSS_PATH("par.cpu.half_weights");
    Refinement<float, uint16_t>(call).run(backward);
  } else {
    WSSS_PATH("par.cpu.exact");
    Refinement<float, float>(call).run(backward);
  }
  return result;
}

static Tensor fwd(const Tensor& image, const Tensor& mask, std::vector<int64_t> size, std::vector<int64_t> dilations,
                  int64_t num_iter, bool pamr, double w1, double w2, double w3, bool exact) {
  return apply("par_fwd", image, mask, size, {std::move(dilations), num_iter, pamr, w1, w2, w3}, exact, false);
}

static Tensor bwd(const Tensor& image, const Tensor& grad, std::vector<int64_t> size, std::vector<int64_t> dilations,
                  int64_t num_iter, bool pamr, double w1, double w2, double w3, bool exact) {
  return apply("par_bwd", image, grad, size, {std::move(dilations), num_iter, pamr, w1, w2, w3}, exact, true);
}

}  // namespace par
}  // namespace wsss

STABLE_TORCH_LIBRARY_FRAGMENT(wsss, m) {
  m.def(
      "par_fwd(Tensor image, Tensor mask, int[] size, int[] dilations, int num_iter, bool pamr, float w1, float w2, "
      "float w3, bool exact) -> Tensor");
  m.def(
      "par_bwd(Tensor image, Tensor grad, int[] size, int[] dilations, int num_iter, bool pamr, float w1, float w2, "
      "float w3, bool exact) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(wsss, CPU, m) {
  m.impl("par_fwd", TORCH_BOX(&wsss::par::fwd));
  m.impl("par_bwd", TORCH_BOX(&wsss::par::bwd));
}
