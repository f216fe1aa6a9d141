// The random walk y ← ½ (S + Sᵀ) y, S = diag(row)·A·diag(col), by passes over rows of A: one pass gives both products.
#pragma once
#include "ops/random_walk/walk_shape.h"
#include "ops/sinkhorn/scaling.h"

namespace wsss {
namespace walk {
#define WSSS_CPU_KERNELS "ops/random_walk/random_walk_cpu.inc"
#include "wsss/cpu_kernels.h"

template <class T>
struct Kernels {
  static constexpr auto scaled = [](auto&&... a) { WSSS_CPU(WalkKernels<T>::scaled)(a...); };
  static constexpr auto symmetrised = [](auto&&... a) { WSSS_CPU(WalkKernels<T>::symmetrised)(a...); };
  static constexpr auto scaling_adjoint = [](auto&&... a) { WSSS_CPU(WalkKernels<T>::scaling_adjoint)(a...); };
};
}  // namespace walk

// What the forward pass leaves for the backward pass, float64
// [2·rounds + 3·classes·power][n]: the scalings of every round, then for
// each step its input y, A (col ∘ y) and Aᵀ (row ∘ y).
struct Tape {
  double* data;
  int64_t n, classes, rounds, power;
  Scalings scalings() const { return {data, n, rounds}; }
  const double* row() const { return rounds ? scalings().row(rounds) : nullptr; }
  const double* col() const { return rounds ? scalings().col(rounds) : nullptr; }
  double* step(int64_t s, int64_t part) const { return data + (2 * rounds + (3 * s + part) * classes) * n; }
  double* input(int64_t s) const { return step(s, 0); }
  double* by_col(int64_t s) const { return step(s, 1); }
  double* by_row(int64_t s) const { return step(s, 2); }
};

template <class T>
struct WalkSpace {
  Buffer<T> right, left;
  Buffer<double> product, sums, state;
  PassSpace<T> pass;
  WalkSpace(int64_t n, int64_t classes)
      : right((classes + 1) * n),
        left(classes * n),
        product((classes + 1) * n),
        sums(n),
        state(classes * n),
        pass(n, classes) {}
};

// A (col ∘ y) and Aᵀ (row ∘ y) once the scalings are known.
template <class T, class Source>
void both_products(const Source& source, const Tape& tape, const double* y, WalkSpace<T>& space, double* by_col,
                   double* by_row) {
  walk::Kernels<T>::scaled(tape.col(), y, tape.classes, tape.n, space.right.data());
  walk::Kernels<T>::scaled(tape.row(), y, tape.classes, tape.n, space.left.data());
  MatrixPass<T> pass;
  pass.n = tape.n;
  pass.right = space.right.data();
  pass.left = space.left.data();
  pass.rights = pass.lefts = tape.classes;
  pass.product = by_col;
  run_pass(source, pass, space.pass, by_row);
}

// The last row step of Sinkhorn and the first step of the walk in one pass: row_i is known when row i has been summed.
template <class T, class Source>
void last_row_and_first_step(const Source& source, const Tape& tape, WalkSpace<T>& space) {
  const int64_t n = tape.n;
  const Scalings s = tape.scalings();
  const double* col = s.col(s.rounds);
  std::copy(col, col + n, space.right.data());
  walk::Kernels<T>::scaled(col, tape.input(0), tape.classes, n, space.right.data() + n);
  walk::Kernels<T>::scaled(nullptr, tape.input(0), tape.classes, n, space.left.data());
  MatrixPass<T> pass;
  pass.n = n;
  pass.weight = LeftWeight::scaling;
  pass.right = space.right.data();
  pass.rights = tape.classes + 1;
  pass.product = space.product.data();
  pass.left = space.left.data();
  pass.lefts = tape.classes;
  pass.row = s.row(s.rounds - 1);
  pass.written = s.row(s.rounds);
  run_pass(source, pass, space.pass, tape.by_row(0));
  std::copy(space.product.data() + n, space.product.data() + (tape.classes + 1) * n, tape.by_col(0));
}

// Where the mask [classes][n] multiplies: the maps that walk, or those that have walked. One of the two, or neither.
template <class T>
struct WalkMask {
  const T *source = nullptr, *target = nullptr;
  WalkMask(const std::optional<Tensor>& mask, bool target_side, int64_t at) {
    if (mask) (target_side ? target : source) = in<T>(*mask) + at;
  }
};

template <class T, class From, class To>
void masked_copy(const From* from, const T* mask, int64_t count, To* to) {
  if (mask)
    for (int64_t i = 0; i < count; ++i) to[i] = T(from[i]) * mask[i];
  else
    std::copy(from, from + count, to);
}

// No step, or no class: only the mask.
template <class T>
void stand_still(const T* cam, const WalkMask<T>& mask, int64_t count, T* out) {
  masked_copy(cam, mask.source ? mask.source : mask.target, count, out);
}

// out = T^power cam; cam and out [classes][n], power and classes at least 1. Passes over A: 1 + rounds + power - 1.
template <class T, class Source>
void walk_forward(const Source& source, const T* cam, const WalkMask<T>& mask, const Tape& tape, T* out) {
  const int64_t n = tape.n, size = tape.classes * n;
  WalkSpace<T> space(n, tape.classes);
  masked_copy(cam, mask.source, size, tape.input(0));
  if (tape.rounds) {
    scale_until_last_row(source, tape.scalings(), space.pass, space.right.data(), space.product.data(),
                         space.sums.data());
    last_row_and_first_step(source, tape, space);
  } else {
    both_products(source, tape, tape.input(0), space, tape.by_col(0), tape.by_row(0));
  }
  for (int64_t s = 0;; ++s) {
    double* next = s + 1 < tape.power ? tape.input(s + 1) : space.state.data();
    walk::Kernels<T>::symmetrised(tape.row(), tape.col(), tape.by_col(s), tape.by_row(s), tape.classes, n, next);
    if (s + 1 == tape.power) break;
    both_products(source, tape, next, space, tape.by_col(s + 1), tape.by_row(s + 1));
  }
  masked_copy(space.state.data(), mask.target, size, out);
}

// What step s adds to the gradients of the scalings and, in low rank, of A. g: the gradient of the step's output.
inline void step_adjoint(const Tape& tape, int64_t s, const double* g, const double* g_by_col, const double* g_by_row,
                         double* grad_row, double* grad_col, LowRank& low) {
  const int64_t n = tape.n;
  const double *row = tape.row(), *col = tape.col();
  for (int64_t k = 0; k < tape.classes; ++k) {
    const double *y = tape.input(s) + k * n, *gk = g + k * n;
    auto [left_g, right_y] = low.add();
    auto [left_y, right_g] = low.add();
    for (int64_t j = 0; j < n; ++j) {
      const double r = 0.5 * (row ? row[j] : 1.), c = col ? col[j] : 1.;
      left_g[j] = r * gk[j];
      left_y[j] = r * y[j];
      right_g[j] = c * gk[j];
      right_y[j] = c * y[j];
    }
    walk::Kernels<double>::scaling_adjoint(y, gk, tape.by_col(s) + k * n, tape.by_row(s) + k * n, g_by_col + k * n,
                                           g_by_row + k * n, n, grad_row, grad_col);
  }
}

// Rank of the gradient with respect to A.
inline int64_t walk_rank(int64_t classes, int64_t rounds, int64_t power) { return 2 * (classes * power + rounds); }

// grad_cam from grad, both [classes][n], and the gradient with respect to A in `low`, where it is wanted.
template <class T, class Source>
void walk_backward(const Source& source, const T* grad, const WalkMask<T>& mask, const Tape& tape, T* grad_cam,
                   LowRank* low) {
  const int64_t n = tape.n, size = tape.classes * n;
  WalkSpace<T> space(n, tape.classes);
  Buffer<double> by_col(size), by_row(size), grad_row(n), grad_col(n);
  double* g = space.state.data();
  masked_copy(grad, mask.target, size, g);
  std::fill(grad_row.data(), grad_row.data() + n, 0.);
  std::fill(grad_col.data(), grad_col.data() + n, 0.);
  for (int64_t s = tape.power - 1; s >= 0; --s) {
    both_products(source, tape, g, space, by_col.data(), by_row.data());
    if (low) step_adjoint(tape, s, g, by_col.data(), by_row.data(), grad_row.data(), grad_col.data(), *low);
    walk::Kernels<T>::symmetrised(tape.row(), tape.col(), by_col.data(), by_row.data(), tape.classes, n, g);
  }
  masked_copy(g, mask.source, size, grad_cam);
  if (!low || !tape.rounds) return;
  double* grad_sums = grad_row.data();
  for (int64_t i = 0; i < n; ++i) grad_sums[i] = -(grad_row[i] * tape.row()[i]) * tape.row()[i];
  std::copy(grad_sums, grad_sums + n, space.left.data());
  MatrixPass<T> pass;
  pass.n = n;
  pass.left = space.left.data();
  pass.lefts = 1;
  run_pass(source, pass, space.pass, space.sums.data());
  for (int64_t j = 0; j < n; ++j) grad_col[j] += space.sums[j];
  scale_adjoint(source, tape.scalings(), space.pass, grad_sums, grad_col.data(), *low);
}

}  // namespace wsss
