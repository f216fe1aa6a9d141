// Sinkhorn scaling by passes over a matrix that is given in rows: read from memory, or computed strip by strip.
#pragma once
#include <algorithm>
#include <vector>

#include "ops/sinkhorn/matrix_pass.h"
#include "wsss/tensor.h"

namespace wsss {
namespace matrix {
#define WSSS_CPU_KERNELS "ops/sinkhorn/sinkhorn_cpu.inc"
#include "wsss/cpu_kernels.h"

template <class T>
struct Kernels {
  static constexpr auto pass = [](auto&&... a) { WSSS_CPU(PassKernels<T>::pass)(a...); };
  static constexpr auto add_partials = [](auto&&... a) { WSSS_CPU(PassKernels<T>::add)(a...); };
  static constexpr auto outer = [](auto&&... a) { WSSS_CPU(PassKernels<T>::outer)(a...); };
};
}  // namespace matrix

// A matrix in memory, as a source of rows.
template <class T>
struct StoredRows {
  const T* data;
  int64_t n, ld;
  struct Scratch {};
  int64_t strip() const { return n; }
  Scratch scratch() const { return {}; }
  const T* rows(int64_t i, int64_t, Scratch&) const { return data + i * ld; }
  int64_t stride() const { return ld; }
};

// Rows per chunk. A chunk has its own column sums, added afterwards in the order of the chunks: a function of n alone,
// so that the bits do not depend on the number of threads. At most 32 chunks bound the workspace; a multiple of 32
// rows, as strips that are computed need.
inline int64_t chunk_rows(int64_t n) { return std::max<int64_t>(1, (n + 1023) / 1024) * 32; }
inline int64_t chunk_count(int64_t n) { return (n + chunk_rows(n) - 1) / chunk_rows(n); }

template <class T>
struct PassSpace {
  Buffer<T> partial;
  PassSpace(int64_t n, int64_t lefts) : partial(chunk_count(n) * std::max<int64_t>(lefts, 1) * n) {}
};

// Runs a pass; `sums` [lefts][n] receives the products from the left, if there are any.
template <class T, class Source>
void run_pass(const Source& source, const MatrixPass<T>& pass, PassSpace<T>& space, double* sums) {
  const int64_t n = pass.n, per = chunk_rows(n), chunks = chunk_count(n), stride = pass.lefts * n;
  const bool tiny = n * n * (pass.rights + pass.lefts) < (1 << 14) && source.strip() == n;
  parallel_for(0, chunks, tiny ? chunks : 1, [&](int64_t begin, int64_t end) {
    auto scratch = source.scratch();
    Buffer<T> weight(std::max<int64_t>(pass.lefts, 1) * 4);
    for (int64_t c = begin; c < end; ++c) {
      T* partial = space.partial.data() + c * stride;
      const int64_t last = std::min(n, (c + 1) * per);
      for (int64_t i = c * per; i < last; i += source.strip()) {
        const int64_t count = std::min(source.strip(), last - i);
        matrix::Kernels<T>::pass(pass, source.rows(i, count, scratch), source.stride(), i, count, weight.data(),
                                 i == c * per, partial);
      }
    }
  });
  if (!pass.lefts) return;
  parallel_for(0, (stride + 255) / 256, std::max<int64_t>(1, (1 << 10) / chunks), [&](int64_t begin, int64_t end) {
    matrix::Kernels<T>::add_partials(space.partial.data(), chunks, stride, begin * 256, std::min(stride, end * 256),
                                     sums);
  });
}

// The scalings of all rounds, [2·rounds][n]: col_1, row_1, col_2, row_2, ...; row_0 is all ones.
struct Scalings {
  double* data;
  int64_t n, rounds;
  double* col(int64_t t) const { return data + (2 * t - 2) * n; }
  double* row(int64_t t) const { return t ? data + (2 * t - 1) * n : nullptr; }
};

inline void invert_sums(const double* sums, const double* previous, double* scaling, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    const double share = previous ? previous[j] * sums[j] : sums[j];
    scaling[j] = share < double(kEmptySum) ? 0. : 1. / sums[j];
  }
}

// All rounds but the last row step, which the caller fuses with what comes after: gives col_1 ... col_rounds and
// row_1 ... row_(rounds-1). `right`, `products` and `sums` are scratch [n].
template <class T, class Source>
void scale_until_last_row(const Source& source, const Scalings& s, PassSpace<T>& space, T* right, double* products,
                          double* sums) {
  MatrixPass<T> columns;
  columns.n = s.n;
  columns.lefts = 1;
  run_pass(source, columns, space, sums);
  invert_sums(sums, nullptr, s.col(1), s.n);
  for (int64_t t = 1; t < s.rounds; ++t) {
    std::copy(s.col(t), s.col(t) + s.n, right);
    MatrixPass<T> both = columns;
    both.weight = LeftWeight::scaling;
    both.right = right;
    both.rights = 1;
    both.product = products;
    both.row = s.row(t - 1);
    both.written = s.row(t);
    run_pass(source, both, space, sums);
    invert_sums(sums, s.col(t), s.col(t + 1), s.n);
  }
}

// The last row step alone, writing the normalised matrix if there is room for it.
template <class T, class Source>
void scale_last_row(const Source& source, const Scalings& s, PassSpace<T>& space, T* right, double* products,
                    T* normalised) {
  std::copy(s.col(s.rounds), s.col(s.rounds) + s.n, right);
  MatrixPass<T> rows;
  rows.n = s.n;
  rows.weight = LeftWeight::scaling;
  rows.right = right;
  rows.rights = 1;
  rows.product = products;
  rows.row = s.row(s.rounds - 1);
  rows.written = s.row(s.rounds);
  rows.normalised = normalised;
  run_pass(source, rows, space, nullptr);
}

// A gradient of low rank, Σ_ρ u_ρ v_ρᵀ, as which every adjoint of this file adds to the gradient of the matrix.
// Padded, because the product kernels read full register blocks.
struct LowRank {
  int64_t n, stride, rank = 0;
  Buffer<double> u, v;
  LowRank(int64_t n, int64_t capacity) : n(n), stride((n + 63) / 64 * 64), u(capacity * stride), v(capacity * stride) {}
  std::pair<double*, double*> add() {
    double *left = u.data() + rank * stride, *right = v.data() + rank * stride;
    std::fill(left + n, left + stride, 0.);
    std::fill(right + n, right + stride, 0.);
    ++rank;
    return {left, right};
  }
};

// Adjoint of the rounds. grad_col: the gradient of col_rounds, all contributions through row_rounds included;
// grad_sums: that of the last row sums. Both are overwritten.
template <class T, class Source>
void scale_adjoint(const Source& source, const Scalings& s, PassSpace<T>& space, double* grad_sums, double* grad_col,
                   LowRank& result) {
  const int64_t n = s.n;
  Buffer<double> products(n);
  Buffer<T> right(n);
  for (int64_t t = s.rounds; t >= 1; --t) {
    auto [row_left, row_right] = result.add();
    std::copy(grad_sums, grad_sums + n, row_left);
    std::copy(s.col(t), s.col(t) + n, row_right);
    auto [col_left, col_right] = result.add();
    for (int64_t j = 0; j < n; ++j) {
      col_left[j] = t > 1 ? s.row(t - 1)[j] : 1.;
      col_right[j] = -(grad_col[j] * s.col(t)[j]) * s.col(t)[j];
      right[j] = T(col_right[j]);
    }
    if (t == 1) break;
    MatrixPass<T> pass;
    pass.n = n;
    pass.weight = LeftWeight::adjoint;
    pass.right = right.data();
    pass.rights = 1;
    pass.product = products.data();
    pass.lefts = 1;
    pass.row = s.row(t - 1);
    pass.written = grad_sums;
    run_pass(source, pass, space, grad_col);
  }
  // Whatever ended empty has gradient 0, although its entries are part of the first sums.
  for (int64_t j = 0; j < n; ++j)
    for (int64_t k = 0; k < result.rank; ++k) {
      if (s.row(s.rounds)[j] == 0) result.u[k * result.stride + j] = 0;
      if (s.col(s.rounds)[j] == 0) result.v[k * result.stride + j] = 0;
    }
}

// The gradient of the matrix; with grad, row_i grad_ij col_j is added.
template <class T>
void write_low_rank(const LowRank& g, const T* grad, const double* row, const double* col, T* out) {
  if (!g.rank) std::fill(out, out + g.n * g.n, T(0));
  constexpr int64_t kRows = 32;
  parallel_for(0, g.rank ? (g.n + kRows - 1) / kRows : 0, 2, [&](int64_t begin, int64_t end) {
    matrix::Kernels<T>::outer(g.u.data(), g.v.data(), g.rank, g.stride, g.n, begin * kRows, std::min(g.n, end * kRows),
                              grad, row, col, out);
  });
}

// Runs body(b) for every matrix of a batch: small matrices one per thread, large ones with all threads, one after the
// other, so that a matrix stays in the cache from pass to pass.
template <class F>
void for_each_matrix(int64_t batch, int64_t n, const F& body) {
  parallel_for(0, batch, n <= 192 ? 1 : batch, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) body(b);
  });
}

}  // namespace wsss
