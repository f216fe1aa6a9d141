// Schema and CPU registration of Sinkhorn normalisation.
#include <tuple>

#include "ops/sinkhorn/scaling.h"
#include "ops/sinkhorn/square.h"

namespace wsss {
namespace {

template <class T>
void forward_one(const T* matrix, int64_t n, int64_t rounds, double* scales, T* normalised) {
  const StoredRows<T> source{matrix, n, n};
  const Scalings s{scales, n, rounds};
  if (rounds == 0) {
    if (normalised) std::copy(matrix, matrix + n * n, normalised);
    return;
  }
  PassSpace<T> space(n, 1);
  Buffer<T> right(n);
  Buffer<double> products(n), sums(n);
  scale_until_last_row(source, s, space, right.data(), products.data(), sums.data());
  scale_last_row(source, s, space, right.data(), products.data(), normalised);
}

template <class T>
void backward_one(const T* grad, const T* matrix, int64_t n, int64_t rounds, double* scales, T* out) {
  if (rounds == 0) {
    std::copy(grad, grad + n * n, out);
    return;
  }
  const StoredRows<T> source{matrix, n, n};
  const Scalings s{scales, n, rounds};
  PassSpace<T> space(n, 1);
  Buffer<T> col(n);
  Buffer<double> products(n), grad_sums(n), grad_col(n);
  std::copy(s.col(rounds), s.col(rounds) + n, col.data());
  MatrixPass<T> first;
  first.n = n;
  first.weight = LeftWeight::adjoint;
  first.product = products.data();
  first.row = s.row(rounds);
  first.written = grad_sums.data();
  first.grad = grad;
  first.col = col.data();
  first.lefts = 1;
  run_pass(source, first, space, grad_col.data());
  LowRank low(n, 2 * rounds);
  scale_adjoint(source, s, space, grad_sums.data(), grad_col.data(), low);
  write_low_rank(low, grad, s.row(rounds), s.col(rounds), out);
}

void note_path(int64_t n) {
  WSSS_PATH("sinkhorn.forward");
  if (n <= 192) WSSS_PATH("sinkhorn.forward.small");
}

// The normalised matrix and the scalings of every round in float64, B×2·num_iter×N: col_1, row_1, col_2, ...
std::tuple<Tensor, Tensor> sinkhorn_fwd(const Tensor& matrix, int64_t num_iter) {
  const auto [m, batch, n] = square("sinkhorn", "matrix", matrix);
  WSSS_CHECK(num_iter >= 0, "sinkhorn: num_iter must be at least 0, got ", num_iter);
  Tensor normalised = wsss::new_empty(m, sizes_of(m));
  Tensor scales = wsss::new_empty(m, {batch, 2 * num_iter, n}, ScalarType::Double);
  if (batch && n) {
    note_path(n);
    for_float_type("sinkhorn", m, [&, &m = m, n = n](auto tag) {
      using T = decltype(tag);
      for_each_matrix(batch, n, [&](int64_t b) {
        forward_one(in<T>(m) + b * n * n, n, num_iter, out<double>(scales) + b * 2 * num_iter * n,
                    out<T>(normalised) + b * n * n);
      });
    });
  }
  return {normalised, scales};
}

// The vectors (row, col), …×N; num_iter at least 1.
std::tuple<Tensor, Tensor> sinkhorn_scaling_fwd(const Tensor& matrix, int64_t num_iter) {
  const auto [m, batch, n] = square("sinkhorn_scaling", "matrix", matrix);
  WSSS_CHECK(num_iter >= 1, "sinkhorn_scaling: num_iter must be at least 1, got ", num_iter);
  std::vector<int64_t> sizes = sizes_of(m);
  sizes.pop_back();
  Tensor row = wsss::new_empty(m, sizes), col = wsss::new_empty(m, sizes);
  if (batch && n) {
    note_path(n);
    for_float_type("sinkhorn_scaling", m, [&, &m = m, n = n](auto tag) {
      using T = decltype(tag);
      for_each_matrix(batch, n, [&](int64_t b) {
        Buffer<double> scales(2 * num_iter * n);
        forward_one<T>(in<T>(m) + b * n * n, n, num_iter, scales.data(), nullptr);
        const double* last = scales.data() + 2 * (num_iter - 1) * n;
        std::copy(last, last + n, out<T>(col) + b * n);
        std::copy(last + n, last + 2 * n, out<T>(row) + b * n);
      });
    });
  }
  return {row, col};
}

Tensor sinkhorn_bwd(const Tensor& grad, const Tensor& matrix, const Tensor& scales) {
  const auto [m, batch, n] = square("sinkhorn", "matrix", matrix);
  const Tensor g = dense(grad), s = dense(scales);
  WSSS_CHECK(sizes_of(g) == sizes_of(m), "sinkhorn: grad must have the shape of matrix");
  WSSS_CHECK(s.dim() == 3 && s.size(0) == batch && s.size(2) == n && s.size(1) % 2 == 0,
             "sinkhorn: scales must be B×2·num_iter×N");
  WSSS_CHECK(g.scalar_type() == m.scalar_type() && s.scalar_type() == ScalarType::Double,
             "sinkhorn: grad of the dtype of matrix and float64 scales expected");
  Tensor result = wsss::new_empty(m, sizes_of(m));
  if (batch && n) {
    WSSS_PATH("sinkhorn.backward");
    for_float_type("sinkhorn", m, [&, &m = m, n = n](auto tag) {
      using T = decltype(tag);
      for_each_matrix(batch, n, [&](int64_t b) {
        backward_one(in<T>(g) + b * n * n, in<T>(m) + b * n * n, n, s.size(1) / 2,
                     const_cast<double*>(in<double>(s)) + b * s.size(1) * n, out<T>(result) + b * n * n);
      });
    });
  }
  return result;
}

}  // namespace
}  // namespace wsss

STABLE_TORCH_LIBRARY_FRAGMENT(wsss, m) {
  m.def("sinkhorn_fwd(Tensor matrix, int num_iter) -> (Tensor, Tensor)");
  m.def("sinkhorn_scaling_fwd(Tensor matrix, int num_iter) -> (Tensor, Tensor)");
  m.def("sinkhorn_bwd(Tensor grad, Tensor matrix, Tensor scales) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(wsss, CPU, m) {
  m.impl("sinkhorn_fwd", TORCH_BOX(&wsss::sinkhorn_fwd));
  m.impl("sinkhorn_scaling_fwd", TORCH_BOX(&wsss::sinkhorn_scaling_fwd));
  m.impl("sinkhorn_bwd", TORCH_BOX(&wsss::sinkhorn_bwd));
}
