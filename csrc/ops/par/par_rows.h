// Rows of a tensor's planes in the type of the sums, whatever its strides and element type, and resized on the way; and
// the way back. So nothing but the rows at work is ever converted or resized.
#pragma once
#include "wsss/tensor.h"

namespace wsss {
namespace par {

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// One row: `step` elements apart in memory, dense in the type T of the sums.
template <class T>
struct RowKernels {
  void (*read)(const void* row, int64_t step, int64_t count, T* to);
  void (*write)(const T* from, int64_t count, void* row);
};

inline int64_t element_bytes(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? 8 : t.scalar_type() == ScalarType::Float ? 4 : 2;
}

// Bilinear resizing of one axis, align_corners=True: target i lies between the sources low[i] and low[i] + 1.
struct Axis {
  Axis(int64_t from, int64_t to) : from(from), low(to), share(to) {
    const double scale = to > 1 ? double(from - 1) / double(to - 1) : 0;
    for (int64_t i = 0; i < to; ++i) {
      low[i] = std::min(int64_t(scale * double(i)), std::max<int64_t>(from - 2, 0));
      share[i] = scale * double(i) - double(low[i]);
    }
  }
  int64_t next(int64_t i) const { return std::min(low[i] + 1, from - 1); }

  const int64_t from;
  Buffer<int64_t> low;
  Buffer<double> share;  // of the source low[i] + 1
};

// The planes of a tensor B×C×h×w, read as if they were resized to height × width.
template <class T>
class Planes {
 public:
  Planes(const Tensor& t, RowKernels<T> kernels, int64_t height, int64_t width)
      : kernels_(kernels),
        at_(static_cast<const char*>(t.numel() ? t.const_data_ptr() : nullptr)),
        bytes_(element_bytes(t)),
        width_(width),
        resized_(t.size(2) != height || t.size(3) != width),
        rows_(t.size(2), resized_ ? height : 0),
        columns_(t.size(3), resized_ ? width : 0) {
    for (int i = 0; i < 4; ++i) stride_[i] = t.stride(i);
  }
  int64_t scratch() const { return resized_ ? 2 * columns_.from : 0; }
  bool resized() const { return resized_; }

  void row(int64_t b, int64_t c, int64_t y, T* to, T* scratch) const {
    if (!resized_) return read(b, c, y, width_, to);
    const int64_t width = columns_.from;
    const T share = T(rows_.share[y]);
    T* below = scratch + width;
    read(b, c, rows_.low[y], width, scratch);
    if (share > T(0)) {
      read(b, c, rows_.next(y), width, below);
      for (int64_t x = 0; x < width; ++x) scratch[x] = (T(1) - share) * scratch[x] + share * below[x];
    }
    for (int64_t x = 0; x < width_; ++x) {
      const T part = T(columns_.share[x]);
      to[x] = (T(1) - part) * scratch[columns_.low[x]] + part * scratch[columns_.next(x)];
    }
  }

 private:
  void read(int64_t b, int64_t c, int64_t y, int64_t count, T* to) const {
    kernels_.read(at_ + (b * stride_[0] + c * stride_[1] + y * stride_[2]) * bytes_, stride_[3], count, to);
  }

  const RowKernels<T> kernels_;
  const char* const at_;
  const int64_t bytes_, width_;
  const bool resized_;
  const Axis rows_, columns_;
  int64_t stride_[4];
};

// Row i of the gradient with respect to a plane that was resized, from the gradient of the result: rows `stride` apart.
// `blended` holds one row of the result. Gathered in y and in the order of x, so every cell is one ordered sum.
template <class T>
void resize_adjoint(const Axis& rows, const Axis& columns, const T* grad, int64_t stride, int64_t i, T* to,
                    T* blended) {
  const int64_t height = rows.low.size(), width = columns.low.size();
  std::fill(blended, blended + width, T(0));
  const int64_t* low = rows.low.data();
  for (int64_t y = std::lower_bound(low, low + height, i - 1) - low; y < height && low[y] <= i; ++y) {
    // where there is one source row, both shares belong to it
    const double weight = (low[y] == i ? 1 - rows.share[y] : 0) + (rows.next(y) == i ? rows.share[y] : 0);
    for (int64_t x = 0; x < width; ++x) blended[x] += T(weight) * grad[y * stride + x];
  }
  std::fill(to, to + columns.from, T(0));
  for (int64_t x = 0; x < width; ++x) {
    const T part = T(columns.share[x]);
    to[columns.low[x]] += (T(1) - part) * blended[x];
    to[columns.next(x)] += part * blended[x];
  }
}

}  // namespace par
}  // namespace wsss
