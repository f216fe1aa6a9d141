// Sinkhorn scaling on the GPU by products of a non-negative matrix with vectors, and its adjoint. Vectors are double,
// as on the CPU: the gradient of the matrix is a small difference of large terms made of them.
//
// A pass is a structure: weight(b, k, line, other) multiplies the entries of a row or column of matrix b, finish(b, k,
// line, sum) takes their sum, vector by vector in order. An algorithm is written once, for a runner: InBlock runs it in
// one launch, one block a matrix, Launches runs every pass as a launch of its own.
#pragma once
#include <algorithm>

#include "wsss/cuda_block.h"

namespace wsss::sinkhorn {

constexpr int kThreads = 256, kWarps = kThreads / kWarpThreads;
constexpr int kVectors = 8;            // that share one reading of the matrix
constexpr int kRowsTogether = 4;       // of a warp, which share one reading of the vectors
constexpr int64_t kBlockTokens = 128;  // largest matrix of one block

// Of Sinkhorn's sums: what is smaller has nothing to normalise and stays 0.
constexpr double kEmptySum = 1.1754943508222875e-38;

__device__ __forceinline__ double as_double(float x) { return double(x); }
__device__ __forceinline__ double as_double(double x) { return x; }
template <class T>
__device__ __forceinline__ double as_double(T x) {
  return double(float(x));
}
template <class T>
__device__ __forceinline__ T from_double(double x) {
  if constexpr (sizeof(T) == 8)
    return x;
  else
    return T(float(x));
}

template <class T>
struct Matrices {
  const T* data;
  int64_t n, batch;
  __device__ const T* at(int64_t b) const { return data + b * n * n; }
};

// One warp: the products of `kRows` rows from row i on with all vectors of the pass.
template <int kRows, class T, class P>
__device__ void row_products(const Matrices<T>& m, int64_t b, int64_t i, const P& pass) {
  const int lane = int(threadIdx.x) % kWarpThreads;
  const T* row = m.at(b) + i * m.n;
  for (int64_t first = 0; first < pass.count(); first += kVectors) {
    const int many = int(first + kVectors < pass.count() ? kVectors : pass.count() - first);
    double sum[kRows][kVectors] = {};
    for (int64_t j = lane; j < m.n; j += kWarpThreads) {
      double entry[kRows];
      WSSS_UNROLL
      for (int r = 0; r < kRows; ++r) entry[r] = i + r < m.n ? as_double(row[r * m.n + j]) : 0.;
      WSSS_UNROLL
      for (int k = 0; k < kVectors; ++k) {
        if (k < many) {
          WSSS_UNROLL
          for (int r = 0; r < kRows; ++r)
            if (r == 0 || i + r < m.n) sum[r][k] += entry[r] * pass.weight(b, first + k, i + r, j);
        }
      }
    }
    WSSS_UNROLL
    for (int r = 0; r < kRows; ++r) {
      WSSS_UNROLL
      for (int k = 0; k < kVectors; ++k) {
        if (k >= many || i + r >= m.n) continue;
        for (int d = kWarpThreads / 2; d > 0; d /= 2) sum[r][k] += __shfl_xor_sync(~0u, sum[r][k], d);
        if (lane == 0) pass.finish(b, first + k, i + r, sum[r][k]);
      }
    }
  }
}

// The block: the products of 32 columns with the rows from `begin` up to `end`, shared out among its warps and added in
// their order. take(k, column, sum) has the sums, vector by vector in order.
template <class T, class P, class Take>
__device__ void column_products(const Matrices<T>& m, int64_t b, int64_t tile, int64_t begin, int64_t end,
                                const P& pass, const Take& take) {
  WSSS_SHARED(double, parts, [kVectors][kWarps][kWarpThreads]);
  const int lane = int(threadIdx.x) % kWarpThreads, warp = int(threadIdx.x) / kWarpThreads;
  const int64_t j = tile * kWarpThreads + lane;
  for (int64_t first = 0; first < pass.count(); first += kVectors) {
    const int many = int(first + kVectors < pass.count() ? kVectors : pass.count() - first);
    double sum[kVectors] = {};
    for (int64_t i = begin + warp; j < m.n && i < end; i += kWarps) {
      const double entry = as_double(m.at(b)[i * m.n + j]);
      WSSS_UNROLL
      for (int k = 0; k < kVectors; ++k)
        if (k < many) sum[k] += entry * pass.weight(b, first + k, j, i);
    }
    WSSS_UNROLL
    for (int k = 0; k < kVectors; ++k) parts[k][warp][lane] = sum[k];
    __syncthreads();
    for (int k = 0; warp == 0 && j < m.n && k < many; ++k) {
      double total = 0;
      for (int w = 0; w < kWarps; ++w) total += parts[k][w][lane];
      take(first + k, j, total);
    }
    __syncthreads();
  }
}

template <int kRows, class T, class P>
__global__ void __launch_bounds__(kThreads) rows_kernel(Matrices<T> m, int64_t blocks, P pass) {
  const int64_t i = (blockIdx.x % blocks * kWarps + threadIdx.x / kWarpThreads) * kRows;
  if (i < m.n) row_products<kRows>(m, blockIdx.x / blocks, i, pass);
}
template <class T, class P>
__global__ void __launch_bounds__(kThreads) columns_kernel(Matrices<T> m, int64_t tiles, P pass) {
  const int64_t b = blockIdx.x / tiles;
  column_products(m, b, blockIdx.x % tiles, 0, m.n, pass,
                  [&](int64_t k, int64_t j, double sum) { pass.finish(b, k, j, sum); });
}
// A slice of the rows: blockIdx.y of gridDim.y. partial: [batch][slices][vectors][n]. Three blocks a
// multiprocessor, since for four (the compiler's own choice) the walk's adjoint spills.
template <class T, class P>
__global__ void __launch_bounds__(kThreads, 3)
    column_slices_kernel(Matrices<T> m, int64_t tiles, int64_t rows, double* partial, P pass) {
  const int64_t b = blockIdx.x / tiles, begin = blockIdx.y * rows;
  double* to = partial + (b * gridDim.y + blockIdx.y) * pass.count() * m.n;
  column_products(m, b, blockIdx.x % tiles, begin, begin + rows < m.n ? begin + rows : m.n, pass,
                  [&](int64_t k, int64_t j, double sum) { to[k * m.n + j] = sum; });
}
// Adds the slices in order, one thread a column.
template <class P>
__global__ void __launch_bounds__(kThreads)
    column_sums_kernel(const double* partial, int64_t n, int64_t batch, int64_t slices, P pass) {
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x, b = at / n, j = at % n;
  if (b >= batch) return;
  const double* from = partial + b * slices * pass.count() * n + j;
  for (int64_t k = 0; k < pass.count(); ++k) {
    double sum = 0;
    for (int64_t s = 0; s < slices; ++s) sum += from[(s * pass.count() + k) * n];
    pass.finish(b, k, j, sum);
  }
}
template <class P>
__global__ void __launch_bounds__(kThreads, 1) cells_kernel(int64_t cells, int64_t batch, P pass) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < cells * batch) pass(i / cells, i % cells);
}

// One block, one matrix.
template <class T>
struct InBlock {
  Matrices<T> m;

  template <class P>
  __device__ void rows(const P& pass) const {
    for (int64_t i = threadIdx.x / kWarpThreads; i < m.n; i += kWarps) row_products<1>(m, blockIdx.x, i, pass);
    __syncthreads();
  }
  template <class P>
  __device__ void columns(const P& pass) const {
    const int64_t b = blockIdx.x;
    for (int64_t tile = 0; tile * kWarpThreads < m.n; ++tile)
      column_products(m, b, tile, 0, m.n, pass, [&](int64_t k, int64_t j, double sum) { pass.finish(b, k, j, sum); });
  }
  template <class P>
  __device__ void cells(int64_t count, const P& pass) const {
    for (int64_t i = threadIdx.x; i < count; i += kThreads) pass(blockIdx.x, i);
    __syncthreads();
  }
};

// Where the columns' tiles do not fill the GPU several times over, into how many slices of at least 64 rows they are
// cut.
inline int64_t column_slices(int64_t n, int64_t batch) {
  const int64_t wanted = 4 * multiprocessors() / (blocks_for(n, kWarpThreads) * batch);
  return std::max<int64_t>(1, std::min({wanted, n / 64, int64_t(64)}));
}
inline int64_t partial_sums(int64_t n, int64_t batch, int64_t vectors) {
  const int64_t slices = column_slices(n, batch);
  return slices > 1 ? slices * batch * vectors * n : 0;
}

template <class T>
struct Launches {
  Matrices<T> m;
  cudaStream_t stream;
  double* partial;  // partial_sums(n, batch, the most vectors of a pass)

  static dim3 grid(int64_t blocks) {
    WSSS_CHECK(blocks < (int64_t(1) << 31), "sinkhorn: the matrices are too large");
    return dim3(static_cast<unsigned>(blocks));
  }
  template <class P>
  void rows(const P& pass) const {
    const bool many = m.n * m.batch >= int64_t(kRowsTogether) * kWarps * 2 * multiprocessors();
    const int64_t blocks = blocks_for(m.n, many ? kWarps * kRowsTogether : kWarps);
    launch(many ? rows_kernel<kRowsTogether, T, P> : rows_kernel<1, T, P>, grid(m.batch * blocks), dim3(kThreads), 0,
           stream, m, blocks, pass);
  }
  template <class P>
  void columns(const P& pass) const {
    const int64_t tiles = blocks_for(m.n, kWarpThreads), slices = column_slices(m.n, m.batch);
    if (slices == 1)
      return launch(columns_kernel<T, P>, grid(m.batch * tiles), dim3(kThreads), 0, stream, m, tiles, pass);
    dim3 cut = grid(m.batch * tiles);
    cut.y = unsigned(slices);
    launch(column_slices_kernel<T, P>, cut, dim3(kThreads), 0, stream, m, tiles, blocks_for(m.n, slices), partial,
           pass);
    launch(column_sums_kernel<P>, grid(blocks_for(m.n * m.batch, kThreads)), dim3(kThreads), 0, stream, partial, m.n,
           m.batch, slices, pass);
  }
  template <class P>
  void cells(int64_t count, const P& pass) const {
    launch(cells_kernel<P>, grid(blocks_for(count * m.batch, kThreads)), dim3(kThreads), 0, stream, count, m.batch,
           pass);
  }
};

// The algorithms are templates that the host and the device instantiate, each with its own runner.
#if defined(__CUDACC__)
#define WSSS_EITHER _Pragma("nv_exec_check_disable")
#else
#define WSSS_EITHER
#endif

// The scalings of all rounds of every matrix: col_1, row_1, col_2, …, as the first rows of a tape of `stride` numbers.
struct Scalings {
  double* data;
  int64_t n, rounds, stride;
  __device__ double* col(int64_t b, int64_t t) const { return data + b * stride + (2 * t - 2) * n; }
  __device__ double* row(int64_t b, int64_t t) const { return data + b * stride + (2 * t - 1) * n; }
  // Row 0 is all ones; so is everything where there is no round.
  __device__ double row_at(int64_t b, int64_t t, int64_t i) const { return t ? row(b, t)[i] : 1.; }
  __device__ double col_at(int64_t b, int64_t t, int64_t j) const { return t ? col(b, t)[j] : 1.; }
};

__device__ __forceinline__ double inverse_sum(double sum, double share) { return share < kEmptySum ? 0. : 1. / sum; }

struct ScaleColumns {
  Scalings s;
  int64_t t;
  __device__ int64_t count() const { return 1; }
  __device__ double weight(int64_t b, int64_t, int64_t, int64_t i) const { return s.row_at(b, t - 1, i); }
  __device__ void finish(int64_t b, int64_t, int64_t j, double sum) const {
    s.col(b, t)[j] = inverse_sum(sum, s.col_at(b, t - 1, j) * sum);
  }
};
struct ScaleRows {
  Scalings s;
  int64_t t;
  __device__ int64_t count() const { return 1; }
  __device__ double weight(int64_t b, int64_t, int64_t, int64_t j) const { return s.col(b, t)[j]; }
  __device__ void finish(int64_t b, int64_t, int64_t i, double sum) const {
    s.row(b, t)[i] = inverse_sum(sum, s.row_at(b, t - 1, i) * sum);
  }
};

WSSS_EITHER
template <class R>
__host__ __device__ void scale(const R& run, const Scalings& s) {
  for (int64_t t = 1; t <= s.rounds; ++t) {
    run.columns(ScaleColumns{s, t});
    run.rows(ScaleRows{s, t});
  }
}

template <class T>
struct WriteNormalised {
  Matrices<T> m;
  Scalings s;
  T* out;
  __device__ void operator()(int64_t b, int64_t cell) const {
    const int64_t i = cell / m.n, j = cell % m.n;
    const double entry = as_double(m.at(b)[cell]);
    const double row = s.row_at(b, s.rounds, i), col = s.col_at(b, s.rounds, j);
    out[b * m.n * m.n + cell] = from_double<T>(row * entry * col);
  }
};

// --- Adjoint. The gradient of the matrix through round t is written_t ⊗ col_t + row_(t−1) ⊗ back_t: the gradients of
// the sums of its rows and of its columns.
struct Adjoint {
  double* data;  // [batch][rounds][written, back][n]
  Scalings s;
  __device__ double* written(int64_t b, int64_t t) const { return data + (b * s.rounds + t - 1) * 2 * s.n; }
  __device__ double* back(int64_t b, int64_t t) const { return written(b, t) + s.n; }
  // Of a sum, from the gradient of the scaling that is its reciprocal.
  __device__ static double of_sum(double gradient, double scaling) { return -(gradient * scaling) * scaling; }
  // Entry (i, j) of all rounds; what ended empty has gradient 0, although it is part of the first sums.
  __device__ double at(int64_t b, int64_t i, int64_t j) const {
    double sum = 0;
    if (s.row_at(b, s.rounds, i) == 0. || s.col_at(b, s.rounds, j) == 0.) return sum;
    for (int64_t t = s.rounds; t >= 1; --t)
      sum += written(b, t)[i] * s.col(b, t)[j] + s.row_at(b, t - 1, i) * back(b, t)[j];
    return sum;
  }
};

struct RowsBack {  // from round t + 1 to round t
  Adjoint a;
  int64_t t;
  __device__ int64_t count() const { return 1; }
  __device__ double weight(int64_t b, int64_t, int64_t, int64_t j) const { return a.back(b, t + 1)[j]; }
  __device__ void finish(int64_t b, int64_t, int64_t i, double sum) const {
    a.written(b, t)[i] = Adjoint::of_sum(sum, a.s.row(b, t)[i]);
  }
};
struct ColumnsBack {
  Adjoint a;
  int64_t t;
  __device__ int64_t count() const { return 1; }
  __device__ double weight(int64_t b, int64_t, int64_t, int64_t i) const { return a.written(b, t)[i]; }
  __device__ void finish(int64_t b, int64_t, int64_t j, double sum) const {
    a.back(b, t)[j] = Adjoint::of_sum(sum, a.s.col(b, t)[j]);
  }
};

// All rounds but the last, whose gradients are there.
WSSS_EITHER
template <class R>
__host__ __device__ void scale_adjoint(const R& run, const Adjoint& a) {
  for (int64_t t = a.s.rounds - 1; t >= 1; --t) {
    run.rows(RowsBack{a, t});
    run.columns(ColumnsBack{a, t});
  }
}

// The last round of a normalised matrix with gradient `grad`.
template <class T>
struct NormalisedRowsBack {
  Adjoint a;
  Matrices<T> grad;
  __device__ int64_t count() const { return 1; }
  __device__ double weight(int64_t b, int64_t, int64_t i, int64_t j) const {
    return as_double(grad.at(b)[i * grad.n + j]) * a.s.col(b, a.s.rounds)[j];
  }
  __device__ void finish(int64_t b, int64_t, int64_t i, double sum) const {
    a.written(b, a.s.rounds)[i] = Adjoint::of_sum(sum, a.s.row(b, a.s.rounds)[i]);
  }
};
template <class T>
struct NormalisedColumnsBack {
  Adjoint a;
  Matrices<T> grad;
  __device__ int64_t count() const { return 1; }
  __device__ double weight(int64_t b, int64_t, int64_t j, int64_t i) const {
    const double direct = a.s.row(b, a.s.rounds)[i] * as_double(grad.at(b)[i * grad.n + j]);
    return direct + a.written(b, a.s.rounds)[i];
  }
  __device__ void finish(int64_t b, int64_t, int64_t j, double sum) const {
    a.back(b, a.s.rounds)[j] = Adjoint::of_sum(sum, a.s.col(b, a.s.rounds)[j]);
  }
};
template <class T>
struct WriteGradient {
  Adjoint a;
  Matrices<T> grad;
  T* out;
  __device__ void operator()(int64_t b, int64_t cell) const {
    const int64_t i = cell / grad.n, j = cell % grad.n, t = a.s.rounds;
    const double direct = a.s.row_at(b, t, i) * as_double(grad.at(b)[cell]) * a.s.col_at(b, t, j);
    out[b * grad.n * grad.n + cell] = from_double<T>(a.at(b, i, j) + direct);
  }
};

WSSS_EITHER
template <class R, class T>
__host__ __device__ void forward(const R& run, const Matrices<T>& m, const Scalings& s, T* normalised) {
  scale(run, s);
  if (normalised) run.cells(m.n * m.n, WriteNormalised<T>{m, s, normalised});
}

WSSS_EITHER
template <class R, class T>
__host__ __device__ void backward(const R& run, const Matrices<T>& grad, const Adjoint& a, T* out) {
  if (a.s.rounds) {
    run.rows(NormalisedRowsBack<T>{a, grad});
    run.columns(NormalisedColumnsBack<T>{a, grad});
    scale_adjoint(run, a);
  }
  run.cells(grad.n * grad.n, WriteGradient<T>{a, grad, out});
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) forward_block(Matrices<T> m, Scalings s, T* normalised) {
  forward(InBlock<T>{m}, m, s, normalised);
}
template <class T>
__global__ void __launch_bounds__(kThreads, 1) backward_block(Matrices<T> m, Matrices<T> grad, Adjoint a, T* out) {
  backward(InBlock<T>{m}, grad, a, out);
}

// Row and column scalings of the last round, of `count` rows in all matrices.
template <class T>
__global__ void __launch_bounds__(kThreads)
    last_scalings(const double* scales, int64_t n, int64_t rounds, int64_t count, T* row, T* col) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const double* last = scales + (i / n * 2 * rounds + 2 * (rounds - 1)) * n + i % n;
  col[i] = T(last[0]);
  row[i] = T(last[n]);
}

}  // namespace wsss::sinkhorn
