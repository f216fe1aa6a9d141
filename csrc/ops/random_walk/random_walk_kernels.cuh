// The random walk y ← ½ (S + Sᵀ) y, S = diag(row)·A·diag(col), on the GPU, and its adjoint, by the passes of
// sinkhorn_kernels.cuh: neither S nor T nor its power is formed.
#pragma once
#include "ops/sinkhorn/sinkhorn_kernels.cuh"

namespace wsss::walk {

using sinkhorn::Adjoint;
using sinkhorn::as_double;
using sinkhorn::from_double;
using sinkhorn::InBlock;
using sinkhorn::kThreads;
using sinkhorn::Matrices;
using sinkhorn::Scalings;

// What the forward pass leaves for the backward pass, [2·rounds + 3·classes·power][n] a matrix: the scalings, then for
// each step its input y, A (col ∘ y) and Aᵀ (row ∘ y).
struct Tape {
  Scalings s;
  int64_t classes, power;
  __device__ double* part(int64_t b, int64_t step, int64_t which) const {
    return s.data + b * s.stride + (2 * s.rounds + (3 * step + which) * classes) * s.n;
  }
  __device__ double* input(int64_t b, int64_t step) const { return part(b, step, 0); }
  __device__ double* by_col(int64_t b, int64_t step) const { return part(b, step, 1); }
  __device__ double* by_row(int64_t b, int64_t step) const { return part(b, step, 2); }
  __device__ double row(int64_t b, int64_t i) const { return s.row_at(b, s.rounds, i); }
  __device__ double col(int64_t b, int64_t j) const { return s.col_at(b, s.rounds, j); }
};

template <class T>
struct Begin {
  Tape tape;
  const T* cam;
  __device__ void operator()(int64_t b, int64_t cell) const {
    tape.input(b, 0)[cell] = as_double(cam[b * tape.classes * tape.s.n + cell]);
  }
};
struct StepRows {
  Tape tape;
  int64_t step;
  __device__ int64_t count() const { return tape.classes; }
  __device__ double weight(int64_t b, int64_t k, int64_t, int64_t j) const {
    return tape.col(b, j) * tape.input(b, step)[k * tape.s.n + j];
  }
  __device__ void finish(int64_t b, int64_t k, int64_t i, double sum) const {
    tape.by_col(b, step)[k * tape.s.n + i] = sum;
  }
};
// Also joins both products to the next step's input, or to the result.
template <class T>
struct StepColumns {
  Tape tape;
  int64_t step;
  T* out;
  __device__ int64_t count() const { return tape.classes; }
  __device__ double weight(int64_t b, int64_t k, int64_t, int64_t i) const {
    return tape.row(b, i) * tape.input(b, step)[k * tape.s.n + i];
  }
  __device__ void finish(int64_t b, int64_t k, int64_t j, double sum) const {
    const int64_t at = k * tape.s.n + j;
    tape.by_row(b, step)[at] = sum;
    const double next = .5 * (tape.row(b, j) * tape.by_col(b, step)[at] + tape.col(b, j) * sum);
    if (step + 1 < tape.power)
      tape.input(b, step + 1)[at] = next;
    else
      out[b * tape.classes * tape.s.n + at] = from_double<T>(next);
  }
};

WSSS_EITHER
template <class R, class T>
__host__ __device__ void forward(const R& run, const T* cam, const Tape& tape, T* out) {
  run.cells(tape.classes * tape.s.n, Begin<T>{tape, cam});
  sinkhorn::scale(run, tape.s);
  for (int64_t step = 0; step < tape.power; ++step) {
    run.rows(StepRows{tape, step});
    run.columns(StepColumns<T>{tape, step, out});
  }
}

// Workspace of the backward pass, a matrix: the gradient of every step's output, one product, gradients of the
// scalings.
struct Gradients {
  Tape tape;
  Adjoint a;
  double* data;
  __device__ double* of_step(int64_t b, int64_t step) const {
    return data + (b * ((tape.power + 1) * tape.classes + 2) + step * tape.classes) * tape.s.n;
  }
  __device__ double* by_col(int64_t b) const { return of_step(b, tape.power); }
  __device__ double* row(int64_t b) const { return by_col(b) + tape.classes * tape.s.n; }
  __device__ double* col(int64_t b) const { return row(b) + tape.s.n; }
};

template <class T>
struct BeginBack {
  Gradients g;
  const T* grad;
  __device__ void operator()(int64_t b, int64_t cell) const {
    g.of_step(b, g.tape.power - 1)[cell] = as_double(grad[b * g.tape.classes * g.tape.s.n + cell]);
  }
};
struct StepRowsBack {
  Gradients g;
  int64_t step;
  __device__ int64_t count() const { return g.tape.classes; }
  __device__ double weight(int64_t b, int64_t k, int64_t, int64_t j) const {
    return g.tape.col(b, j) * g.of_step(b, step)[k * g.tape.s.n + j];
  }
  __device__ void finish(int64_t b, int64_t k, int64_t i, double sum) const { g.by_col(b)[k * g.tape.s.n + i] = sum; }
};
// T is symmetric: the gradient of a step's input is the same step. The classes of a column are finished in order by one
// thread, which adds what they give to the scalings.
template <class T>
struct StepColumnsBack {
  Gradients g;
  int64_t step;
  T* grad_cam;
  __device__ int64_t count() const { return g.tape.classes; }
  __device__ double weight(int64_t b, int64_t k, int64_t, int64_t i) const {
    return g.tape.row(b, i) * g.of_step(b, step)[k * g.tape.s.n + i];
  }
  __device__ void finish(int64_t b, int64_t k, int64_t j, double sum) const {
    const Tape& t = g.tape;
    const int64_t at = k * t.s.n + j;
    const double own = g.of_step(b, step)[at], by_col = g.by_col(b)[at], y = t.input(b, step)[at];
    const bool first = k == 0 && step + 1 == t.power;
    g.row(b)[j] = (first ? 0. : g.row(b)[j]) + .5 * (own * t.by_col(b, step)[at] + y * by_col);
    g.col(b)[j] = (first ? 0. : g.col(b)[j]) + .5 * (y * sum + own * t.by_row(b, step)[at]);
    const double next = .5 * (t.row(b, j) * by_col + t.col(b, j) * sum);
    if (step > 0)
      g.of_step(b, step - 1)[at] = next;
    else
      grad_cam[b * t.classes * t.s.n + at] = from_double<T>(next);
  }
};
// From the gradients of the last scalings to those of the last sums.
struct ScalingsBack {
  Gradients g;
  __device__ int64_t count() const { return 1; }
  __device__ double of_row(int64_t b, int64_t i) const { return Adjoint::of_sum(g.row(b)[i], g.tape.row(b, i)); }
  __device__ double weight(int64_t b, int64_t, int64_t, int64_t i) const { return of_row(b, i); }
  __device__ void finish(int64_t b, int64_t, int64_t j, double sum) const {
    g.a.written(b, g.a.s.rounds)[j] = of_row(b, j);
    g.a.back(b, g.a.s.rounds)[j] = Adjoint::of_sum(g.col(b)[j] + sum, g.tape.col(b, j));
  }
};
template <class T>
struct WriteGradient {
  Gradients g;
  T* out;
  __device__ void operator()(int64_t b, int64_t cell) const {
    const Tape& t = g.tape;
    const int64_t n = t.s.n, i = cell / n, j = cell % n;
    double sum = 0;
    for (int64_t step = t.power - 1; step >= 0; --step) {
      const double *own = g.of_step(b, step), *y = t.input(b, step);
      for (int64_t k = 0; k < t.classes * n; k += n) sum += own[k + i] * y[k + j] + y[k + i] * own[k + j];
    }
    out[b * n * n + cell] = from_double<T>(.5 * t.row(b, i) * t.col(b, j) * sum + g.a.at(b, i, j));
  }
};

WSSS_EITHER
template <class R, class T>
__host__ __device__ void backward(const R& run, const T* grad, const Gradients& g, T* grad_cam, T* grad_affinity) {
  run.cells(g.tape.classes * g.tape.s.n, BeginBack<T>{g, grad});
  for (int64_t step = g.tape.power - 1; step >= 0; --step) {
    run.rows(StepRowsBack{g, step});
    run.columns(StepColumnsBack<T>{g, step, grad_cam});
  }
  if (!grad_affinity) return;
  if (g.a.s.rounds) {
    run.columns(ScalingsBack{g});
    sinkhorn::scale_adjoint(run, g.a);
  }
  run.cells(g.tape.s.n * g.tape.s.n, WriteGradient<T>{g, grad_affinity});
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) forward_block(Matrices<T> m, const T* cam, Tape tape, T* out) {
  forward(InBlock<T>{m}, cam, tape, out);
}
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    backward_block(Matrices<T> m, const T* grad, Gradients g, T* grad_cam, T* grad_affinity) {
  backward(InBlock<T>{m}, grad, g, grad_cam, grad_affinity);
}

template <class T>
__global__ void __launch_bounds__(kThreads) masked_maps(const T* maps, const T* mask, int64_t count, T* out) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) out[i] = from_double<T>(as_double(maps[i]) * as_double(mask[i]));
}

}  // namespace wsss::walk
