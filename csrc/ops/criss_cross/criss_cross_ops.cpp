// Operators of criss_cross: arguments, threads over registers of columns and over rows, registration.
#include "wsss/tensor.h"

namespace wsss {
namespace criss_cross {
namespace {

struct Shape {
  int64_t keys, values, height, width,
      stride;  // stride: row length of the statistics, a multiple of every register block
};

template <class T>
struct Gradients {
  T *query, *key, *value;
};

#define WSSS_CPU_KERNELS "ops/criss_cross/criss_cross_cpu.inc"
#include "wsss/cpu_kernels.h"

WSSS_PICK(column_forward)
WSSS_PICK(row_forward)
WSSS_PICK(row_dot)
WSSS_PICK(column_backward)
WSSS_PICK(row_backward)

constexpr int64_t kStride = 32, kBlock = 32;  // cells of a row of statistics; channels of a block of column products

bool alike(const Tensor& a, const Tensor& b) {
  return a.scalar_type() == b.scalar_type() && a.size(0) == b.size(0) && a.size(2) == b.size(2) &&
         a.size(3) == b.size(3);
}

// What a call works on, made contiguous; offsets of an image in each map.
struct Call {
  Shape shape;
  int64_t batch, pixels, lanes, blocks;
  Tensor query, key, value;

  Call(const Tensor& q, const Tensor& k, const Tensor& v) {
    WSSS_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && q.size(2) > 0 && q.size(3) > 0,
               "criss_cross_attention: maps of B×C×H×W with at least one pixel expected");
    WSSS_CHECK(alike(q, k) && alike(q, v) && q.size(1) == k.size(1),
               "criss_cross_attention: query, key and value must agree in dtype, batch, height and width, query and "
               "key in channels");
    shape = {q.size(1), v.size(1), q.size(2), q.size(3), (q.size(3) + kStride - 1) / kStride * kStride};
    batch = q.size(0);
    pixels = shape.height * shape.width;
    lanes = WSSS_CPU(lane_count)(q.scalar_type() == ScalarType::Float);
    blocks = (shape.width + lanes - 1) / lanes;
    query = torch::stable::contiguous(q);
    key = torch::stable::contiguous(k);
    value = torch::stable::contiguous(v);
  }
  // weights of a register of columns (twice for the gradients), and rows of channels, which also hold the statistics
  int64_t column_cells(int64_t matrices) const {
    return (matrices * shape.height + 2 * kBlock + 3) * shape.height * lanes;
  }
  int64_t row_cells(int64_t matrices) const { return (matrices * shape.width + 3) * shape.stride; }
};

std::tuple<Tensor, Tensor> fwd(const Tensor& query, const Tensor& key, const Tensor& value) {
  const Call call(query, key, value);
  const Shape& s = call.shape;
  Tensor result = torch::stable::empty_like(call.value);
  // per pixel: the maximum of its logits, and one over the sum of their exponentials relative to it
  Tensor statistics = wsss::new_empty(query, std::vector<int64_t>{call.batch, 2, s.height, s.width});
  WSSS_PATH("criss_cross.fwd");
  for_float_type("criss_cross_attention", query, [&](auto tag) {
    using T = decltype(tag);
    const T *q = in<T>(call.query), *k = in<T>(call.key), *v = in<T>(call.value);
    T *o = out<T>(result), *norm = out<T>(statistics);
    const int64_t keys = s.keys * call.pixels, values = s.values * call.pixels, cells = s.height * s.stride;
    Buffer<T> maximum(call.batch * cells), total(call.batch * cells);
    if (s.height > 1)
      parallel_for(0, call.batch * call.blocks, 1, [&](int64_t begin, int64_t end) {
        Buffer<T> work(call.column_cells(1));
        for (int64_t i = begin; i < end; ++i) {
          const int64_t b = i / call.blocks, x = i % call.blocks * call.lanes;
          column_forward(tag)(s, q + b * keys, k + b * keys, v + b * values, x, o + b * values,
                              maximum.data() + b * cells, total.data() + b * cells, work.data());
        }
      });
    parallel_for(0, call.batch * s.height, 1, [&](int64_t begin, int64_t end) {
      Buffer<T> work(call.row_cells(1));
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / s.height, y = i % s.height;
        row_forward(tag)(s, q + b * keys, k + b * keys, v + b * values, y, o + b * values, maximum.data() + b * cells,
                         total.data() + b * cells, norm + 2 * b * call.pixels, work.data());
      }
    });
  });
  return {result, statistics};
}

std::tuple<Tensor, Tensor, Tensor> bwd(const Tensor& query, const Tensor& key, const Tensor& value,
                                       const Tensor& result, const Tensor& statistics, const Tensor& grad) {
  const Call call(query, key, value);
  const Shape& s = call.shape;
  WSSS_CHECK(result.numel() == value.numel() && grad.numel() == value.numel() &&
                 statistics.numel() == 2 * call.batch * call.pixels,
             "criss_cross_attention: out and its gradient must have the size of value, two statistics per pixel");
  const Tensor given = torch::stable::contiguous(result), norm = torch::stable::contiguous(statistics);
  const Tensor gradient = torch::stable::contiguous(grad);
  Tensor dq = torch::stable::empty_like(call.query), dk = torch::stable::empty_like(call.key);
  Tensor dv = torch::stable::empty_like(call.value);
  WSSS_PATH("criss_cross.bwd");
  for_float_type("criss_cross_attention", query, [&](auto tag) {
    using T = decltype(tag);
    const T *q = in<T>(call.query), *k = in<T>(call.key), *v = in<T>(call.value);
    const T *o = in<T>(given), *l = in<T>(norm), *g = in<T>(gradient);
    const Gradients<T> all{out<T>(dq), out<T>(dk), out<T>(dv)};
    const int64_t keys = s.keys * call.pixels, values = s.values * call.pixels, n = call.pixels;
    Buffer<T> dot(call.batch * n);
    const auto image = [&](int64_t b) {
      return Gradients<T>{all.query + b * keys, all.key + b * keys, all.value + b * values};
    };
    parallel_for(0, call.batch * s.height, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / s.height;
        row_dot(tag)(s, g + b * values, o + b * values, i % s.height, dot.data() + b * n);
      }
    });
    if (s.height > 1)
      parallel_for(0, call.batch * call.blocks, 1, [&](int64_t begin, int64_t end) {
        Buffer<T> work(call.column_cells(2));
        for (int64_t i = begin; i < end; ++i) {
          const int64_t b = i / call.blocks, x = i % call.blocks * call.lanes;
          column_backward(tag)(s, q + b * keys, k + b * keys, v + b * values, g + b * values, l + 2 * b * n,
                               dot.data() + b * n, x, image(b), work.data());
        }
      });
    parallel_for(0, call.batch * s.height, 1, [&](int64_t begin, int64_t end) {
      Buffer<T> work(call.row_cells(3));
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / s.height, y = i % s.height;
        row_backward(tag)(s, q + b * keys, k + b * keys, v + b * values, g + b * values, l + 2 * b * n,
                          dot.data() + b * n, y, image(b), work.data());
      }
    });
  });
  return {dq, dk, dv};
}

}  // namespace
}  // namespace criss_cross
}  // namespace wsss

STABLE_TORCH_LIBRARY_FRAGMENT(wsss, m) {
  m.def("criss_cross_fwd(Tensor query, Tensor key, Tensor value) -> (Tensor, Tensor)");
  m.def(
      "criss_cross_bwd(Tensor query, Tensor key, Tensor value, Tensor result, Tensor statistics, Tensor grad) -> "
      "(Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(wsss, CPU, m) {
  m.impl("criss_cross_fwd", TORCH_BOX(&wsss::criss_cross::fwd));
  m.impl("criss_cross_bwd", TORCH_BOX(&wsss::criss_cross::bwd));
}
