// Sign-preserving pyramid pooling on the GPU: one block computes one sample. Its maps lie in shared memory, or for
// larger maps in a workspace of the block in global memory; the code is the same. This file holds the layout, the
// pyramid and its adjoint.
//
// Maps that a convolution reads have a border of zeros: (height + 2)×(width + 2) cells. A level is kept as its pooled
// values and interpolated when it is needed.
#pragma once
#include "ops/mpfp/mpfp_math.h"
#include "wsss/cuda_block.h"

namespace wsss::mpfp {

constexpr int kMaxLevels = 64, kThreads = 256;

struct Sizes {
  int channels, height, width, levels;
  int scale[kMaxLevels];

  __host__ __device__ int pixels() const { return height * width; }
  __host__ __device__ int across() const { return width + 2; }  // cells of a bordered row
  __host__ __device__ int64_t bordered() const { return int64_t(height + 2) * across(); }
  __host__ __device__ int64_t maps() const { return int64_t(channels) * pixels(); }
  __host__ __device__ int64_t bordered_maps() const { return channels * bordered(); }
  __host__ __device__ int64_t inputs() const { return 2 * int64_t(channels) * 9; }  // of a gate: maps × taps
  // Pooled values of the levels before `level`.
  __host__ __device__ int64_t pooled_before(int level) const {
    int64_t sum = 0;
    for (int l = 0; l < level; ++l) sum += int64_t(scale[l]) * scale[l];
    return channels * sum;
  }
};

// Where the parts of a block's workspace begin, in cells behind the interpolation tables.
struct Layout {
  int64_t weight, pooled, columns, level, fused, gate, slope, gradient, finer, total, cells;
  int kept;  // fused maps: two in turn forward, all of them backward

  Layout(const Sizes& s, bool backward) : kept(backward ? s.levels : s.levels < 2 ? 1 : 2) {
    int64_t next = 0;
    const auto part = [&](int64_t& begin, int64_t count) {
      begin = next;
      next += count;
    };
    int largest = 0;
    for (int l = 0; l < s.levels; ++l) largest = s.scale[l] > largest ? s.scale[l] : largest;
    part(weight, 4 * s.inputs());
    part(level, s.bordered_maps());
    part(fused, kept * s.bordered_maps());
    part(slope, backward ? 4 * s.bordered() : 0);
    part(pooled, s.pooled_before(s.levels));
    part(columns, int64_t(s.channels) * largest * s.width);
    part(gate, backward ? 4 * int64_t(s.levels - 1) * s.pixels() : 0);
    part(gradient, backward ? s.maps() : 0);
    part(finer, backward ? s.maps() : 0);
    part(total, backward ? s.maps() : 0);
    cells = next;
  }
  int64_t bytes(const Sizes& s, size_t cell) const {
    const int64_t tables = int64_t(sizeof(Tap)) * s.levels * (s.height + s.width);
    return (tables + cells * int64_t(cell) + 127) / 128 * 128;
  }
};

// The workspace of this block.
template <class A>
struct Maps {
  Sizes s;
  Layout at;
  Tap* taps;
  A* cells;

  __device__ Maps(unsigned char* work, const Sizes& sizes, const Layout& layout)
      : s(sizes),
        at(layout),
        taps(reinterpret_cast<Tap*>(work)),
        cells(reinterpret_cast<A*>(taps + sizes.levels * (sizes.height + sizes.width))) {}

  __device__ Tap* row_taps(int l) const { return taps + l * (s.height + s.width); }
  __device__ Tap* column_taps(int l) const { return row_taps(l) + s.height; }
  __device__ A* weight() const { return cells + at.weight; }
  __device__ A* pooled(int l) const { return cells + at.pooled + s.pooled_before(l); }
  __device__ A* columns() const { return cells + at.columns; }
  __device__ A* level() const { return cells + at.level; }
  __device__ A* fused(int l) const { return cells + at.fused + l % at.kept * s.bordered_maps(); }
  __device__ A* gate(int fusion) const { return cells + at.gate + 4 * int64_t(fusion) * s.pixels(); }
  __device__ A* slope() const { return cells + at.slope; }
  __device__ A* gradient() const { return cells + at.gradient; }
  __device__ A* finer() const { return cells + at.finer; }
  __device__ A* total() const { return cells + at.total; }
  // Input map k of fusion l: the fused maps so far, then the next level's.
  __device__ const A* input(int l, int k) const {
    return k < s.channels ? fused(l) + k * s.bordered() : level() + (k - s.channels) * s.bordered();
  }
  // The cell of a bordered map at the upper left of pixel p's window.
  __device__ int window(int p) const { return p / s.width * s.across() + p % s.width; }
  __device__ int centre(int p) const { return window(p) + s.across() + 1; }
};

// body(i) for i = 0 … n − 1, shared out among the threads.
template <class F>
__device__ __forceinline__ void for_each(int64_t n, const F& body) {
  for (int64_t i = threadIdx.x; i < n; i += kThreads) body(i);
}

// Tables, and the zeros of all borders; once a block.
template <class A>
__device__ void prepare(const Maps<A>& m) {
  const Sizes& s = m.s;
  for_each(int64_t(s.levels) * (s.height + s.width), [&](int64_t i) {
    const int l = int(i / (s.height + s.width)), at = int(i % (s.height + s.width));
    m.taps[i] =
        at < s.height ? upsample_tap(at, s.height, s.scale[l]) : upsample_tap(at - s.height, s.width, s.scale[l]);
  });
  for_each(m.at.pooled - m.at.level, [&](int64_t i) { m.cells[m.at.level + i] = A(0); });
  __syncthreads();
}

// Means over the bins of level l, rows first.
template <class T, class A>
__device__ void pool(const Maps<A>& m, int l, const T* feature) {
  const Sizes& s = m.s;
  const int scale = s.scale[l];
  A *columns = m.columns(), *pooled = m.pooled(l);
  for_each(int64_t(s.channels) * scale * s.width, [&](int64_t i) {
    const int x = int(i % s.width);
    const int64_t line = i / s.width, k = line / scale;
    const Bin rows = pool_bin(line % scale, s.height, scale);
    A sum = 0;
    for (int y = rows.begin; y < rows.end; ++y) sum += A(feature[k * s.pixels() + int64_t(y) * s.width + x]);
    columns[i] = sum;
  });
  __syncthreads();
  for_each(int64_t(s.channels) * scale * scale, [&](int64_t i) {
    const int64_t line = i / scale;
    const Bin rows = pool_bin(line % scale, s.height, scale), bin = pool_bin(i % scale, s.width, scale);
    A sum = 0;
    for (int x = bin.begin; x < bin.end; ++x) sum += columns[line * s.width + x];
    pooled[i] = sum / A(int64_t(bin.end - bin.begin) * (rows.end - rows.begin));
  });
  __syncthreads();
}

// Level l at full size, into bordered maps.
template <class A>
__device__ void interpolate(const Maps<A>& m, int l, A* to) {
  const Sizes& s = m.s;
  const int scale = s.scale[l];
  const A* pooled = m.pooled(l);
  for_each(s.maps(), [&](int64_t i) {
    const int k = int(i / s.pixels()), p = int(i % s.pixels());
    const Tap row = m.row_taps(l)[p / s.width], column = m.column_taps(l)[p % s.width];
    const A* map = pooled + int64_t(k) * scale * scale;
    const auto along = [&](int y) {
      const A low = map[int64_t(y) * scale + column.low], high = map[int64_t(y) * scale + column.high];
      return low + A(column.t) * (high - low);
    };
    const A low = along(row.low), high = along(row.high);
    to[k * s.bordered() + m.centre(p)] = low + A(row.t) * (high - low);
  });
  __syncthreads();
}

// The cells that may take a share of bin i in the interpolation of `scale` bins to `size` cells.
struct Range {
  int begin, end;
};
__device__ __forceinline__ Range cells_near(int i, int size, int scale) {
  const double step = double(size) / double(scale);
  const double begin = floor((double(i) - .5) * step - .5), end = ceil((double(i) + 1.5) * step + .5);
  return {begin > 0. ? int(begin) : 0, end < double(size) ? int(end) : size};
}
template <class A>
__device__ __forceinline__ A share_of(const Tap& tap, int i) {
  return (tap.low == i ? A(1) - A(tap.t) : A(0)) + (tap.high == i ? A(tap.t) : A(0));
}

// The adjoint of pool and interpolate, from plain maps, added to the gradient of the feature. The pooled values of
// the level are overwritten.
template <class A>
__device__ void level_adjoint(const Maps<A>& m, int l, const A* from) {
  const Sizes& s = m.s;
  const int scale = s.scale[l];
  A *columns = m.columns(), *pooled = m.pooled(l), *total = m.total();
  for_each(int64_t(s.channels) * scale * s.width, [&](int64_t i) {
    const int64_t line = i / s.width;
    const int y = int(line % scale);
    const Range near = cells_near(y, s.height, scale);
    const A* map = from + line / scale * s.pixels() + i % s.width;
    A sum = 0;
    for (int r = near.begin; r < near.end; ++r) sum += share_of<A>(m.row_taps(l)[r], y) * map[int64_t(r) * s.width];
    columns[i] = sum;
  });
  __syncthreads();
  for_each(int64_t(s.channels) * scale * scale, [&](int64_t i) {
    const int64_t line = i / scale;
    const int x = int(i % scale);
    const Bin rows = pool_bin(line % scale, s.height, scale), bin = pool_bin(x, s.width, scale);
    const Range near = cells_near(x, s.width, scale);
    A sum = 0;
    for (int c = near.begin; c < near.end; ++c)
      sum += share_of<A>(m.column_taps(l)[c], x) * columns[line * s.width + c];
    pooled[i] = sum / A(int64_t(bin.end - bin.begin) * (rows.end - rows.begin));
  });
  __syncthreads();
  for_each(s.maps(), [&](int64_t i) {
    const int64_t k = i / s.pixels(), y = i % s.pixels() / s.width, x = i % s.width;
    A sum = 0;  // over the bins that hold the pixel; neighbouring ones may overlap
    for (int64_t v = y * scale / s.height; v * s.height < (y + 1) * scale; ++v)
      for (int64_t u = x * scale / s.width; u * s.width < (x + 1) * scale; ++u)
        sum += pooled[(k * scale + v) * scale + u];
    total[i] += sum;
  });
  __syncthreads();
}

}  // namespace wsss::mpfp
