// Sign-preserving pyramid pooling on the GPU: fusions, their gradients, and the kernels. See mpfp_maps.cuh.
#pragma once
#include "ops/mpfp/mpfp_maps.cuh"

namespace wsss::mpfp {

// Pixels of a thread at a time, which share the weights that it reads; as many as the registers hold.
template <class A>
constexpr int kPixels = sizeof(A) == 8 ? 2 : 4;

// The four gates' weights of one tap, or what belongs to the four gates: pos 1, pos 2, neg 1, neg 2.
template <class A>
struct alignas(4 * sizeof(A) > 16 ? 16 : 4 * sizeof(A)) Gates {
  A pos1, pos2, neg1, neg2;
};

__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }
__device__ __forceinline__ double sigmoid(double x) { return 1. / (1. + exp(-x)); }
template <class A>
__device__ __forceinline__ A positive(A x) {
  return x < A(0) ? A(0) : x;  // NaN stays NaN
}
template <class A>
__device__ __forceinline__ A choose(A x, A where_positive, A where_negative) {
  return x > A(0) ? where_positive : x < A(0) ? where_negative : A(0);
}

// What a kernel is given.
template <class T>
struct Arguments {
  const T *feature, *pos, *neg, *grad_logit, *grad_fused;
  T *logit, *fused, *grad_feature;
  double* parts;  // [batch][fusions][inputs][4]: each sample's gradients of the weights
  int64_t batch;
};

// The weights of a fusion, from [2][inputs] of both signs to [inputs][4].
template <class T, class A>
__device__ void load_weights(const Maps<A>& m, const Arguments<T>& call, int fusion) {
  const int64_t inputs = m.s.inputs();
  for_each(4 * inputs, [&](int64_t i) {
    const T* from = i % 4 < 2 ? call.pos : call.neg;
    m.weight()[i] = A(from[(2 * fusion + i % 2) * inputs + i / 4]);
  });
  __syncthreads();
}

// The pixels of a thread, as cells of a bordered map.
template <class A>
struct Group {
  int window[kPixels<A>], pixel[kPixels<A>];
  bool inside[kPixels<A>];

  __device__ Group(const Maps<A>& m, int64_t first) {
    WSSS_UNROLL
    for (int j = 0; j < kPixels<A>; ++j) {
      const int64_t p = first + threadIdx.x + j * kThreads;
      inside[j] = p < m.s.pixels();
      pixel[j] = inside[j] ? int(p) : 0;
      window[j] = m.window(pixel[j]);
    }
  }
};

// z[gate][pixel]: the convolution of both signs of all inputs.
template <class A>
__device__ __forceinline__ void convolve(const Maps<A>& m, int fusion, const Group<A>& group, A (&z)[4][kPixels<A>]) {
  const auto* weight = reinterpret_cast<const Gates<A>*>(m.weight());
  for (int k = 0; k < 2 * m.s.channels; ++k) {
    const A* map = m.input(fusion, k);
    WSSS_UNROLL
    for (int t = 0; t < 9; ++t) {
      const Gates<A> w = weight[k * 9 + t];
      const int offset = t / 3 * m.s.across() + t % 3;
      WSSS_UNROLL
      for (int j = 0; j < kPixels<A>; ++j) {
        const A x = map[group.window[j] + offset], up = positive(x), down = positive(-x);
        z[0][j] += w.pos1 * up;
        z[1][j] += w.pos2 * up;
        z[2][j] += w.neg1 * down;
        z[3][j] += w.neg2 * down;
      }
    }
  }
}

// fused(fusion + 1) from fused(fusion) and the next level; the gates are kept where there is a gradient to compute.
template <class T, class A>
__device__ void fuse(const Maps<A>& m, const Arguments<T>& call, int fusion, bool keep) {
  const Sizes& s = m.s;
  load_weights(m, call, fusion);
  interpolate(m, fusion + 1, m.level());
  const A *a = m.fused(fusion), *b = m.level();
  A* y = m.fused(fusion + 1);
  const int centre = s.across() + 1;
  for (int64_t first = 0; first < s.pixels(); first += kThreads * kPixels<A>) {
    const Group<A> group(m, first);
    A z[4][kPixels<A>] = {};
    convolve(m, fusion, group, z);
    WSSS_UNROLL
    for (int j = 0; j < kPixels<A>; ++j) {
      if (!group.inside[j]) continue;
      WSSS_UNROLL
      for (int g = 0; g < 4; ++g) {
        z[g][j] = sigmoid(z[g][j]);
        if (keep) m.gate(fusion)[int64_t(g) * s.pixels() + group.pixel[j]] = z[g][j];
      }
      for (int k = 0; k < s.channels; ++k) {
        const int64_t at = k * s.bordered() + group.window[j] + centre;
        const A u = a[at], v = b[at];
        y[at] = A(.5) * (u * (u > A(0) ? z[0][j] : z[2][j]) + v * (v > A(0) ? z[1][j] : z[3][j]));
      }
    }
  }
  __syncthreads();
}

template <class T, class A>
__device__ void forward_maps(const Maps<A>& m, const Arguments<T>& call, const T* feature, bool keep) {
  for (int l = 0; l < m.s.levels; ++l) pool(m, l, feature);
  interpolate(m, 0, m.fused(0));
  for (int fusion = 0; fusion + 1 < m.s.levels; ++fusion) fuse(m, call, fusion, keep);
}

// relu(a) relu(f) − relu(−a) relu(−f): the product where the signs agree, with that sign; NaN stays NaN.
template <class A>
__device__ __forceinline__ A signed_product(A a, A f) {
  const A product = a * f;
  return product <= A(0) ? A(0) : (a > A(0) ? product : -product);
}

template <class T, class A>
__device__ void forward_sample(const Maps<A>& m, const Arguments<T>& call, int64_t sample) {
  const Sizes& s = m.s;
  const T* feature = call.feature + sample * s.maps();
  forward_maps(m, call, feature, false);
  const A* last = m.fused(s.levels - 1);
  for (int k = 0; k < s.channels; ++k) {
    double sum = 0;
    for_each(s.pixels(), [&](int64_t p) {
      const A a = last[k * s.bordered() + m.centre(int(p))];
      sum += double(signed_product(a, A(feature[int64_t(k) * s.pixels() + p])));
      call.fused[sample * s.maps() + int64_t(k) * s.pixels() + p] = T(a);
    });
    sum = block_sum(sum);
    if (threadIdx.x == 0) call.logit[sample * s.channels + k] = T(A(sum / double(s.pixels())));
  }
  __syncthreads();
}

// Gradients of the last fused map and, directly, of the feature.
template <class T, class A>
__device__ void pooling_adjoint(const Maps<A>& m, const Arguments<T>& call, int64_t sample) {
  const Sizes& s = m.s;
  const A* last = m.fused(s.levels - 1);
  for_each(s.maps(), [&](int64_t i) {
    const int64_t k = i / s.pixels();
    const A g = A(call.grad_logit[sample * s.channels + k]) / A(s.pixels());
    const A a = last[k * s.bordered() + m.centre(int(i % s.pixels()))], f = A(call.feature[sample * s.maps() + i]);
    const bool agree = (a > A(0) && f > A(0)) || (a < A(0) && f < A(0));
    m.gradient()[i] = A(call.grad_fused[sample * s.maps() + i]) + (agree ? g * (f > A(0) ? f : -f) : A(0));
    m.total()[i] = agree ? g * (a > A(0) ? a : -a) : A(0);
  });
  __syncthreads();
}

// Gradients of what the gates saw: the gate's slope times Σ_c G_c · (what it weighs).
template <class A>
__device__ void gate_gradients(const Maps<A>& m, int fusion) {
  const Sizes& s = m.s;
  for_each(s.pixels(), [&](int64_t p) {
    const int centre = m.centre(int(p));
    A d[4] = {};
    for (int k = 0; k < s.channels; ++k) {
      const A half = A(.5) * m.gradient()[int64_t(k) * s.pixels() + p];
      const A u = m.fused(fusion)[k * s.bordered() + centre], v = m.level()[k * s.bordered() + centre];
      d[0] += half * positive(u);
      d[1] += half * positive(v);
      d[2] -= half * positive(-u);
      d[3] -= half * positive(-v);
    }
    WSSS_UNROLL
    for (int g = 0; g < 4; ++g) {
      const A value = m.gate(fusion)[int64_t(g) * s.pixels() + p];
      m.slope()[g * s.bordered() + centre] = d[g] * value * (A(1) - value);
    }
  });
  __syncthreads();
}

// One warp per input map and row of taps: lanes share out the pixels, sums are short before they become double.
template <class A>
__device__ void weight_gradients(const Maps<A>& m, int fusion, double* parts) {
  const Sizes& s = m.s;
  constexpr int kShort = 64 * kWarpThreads;
  const int lane = int(threadIdx.x) % kWarpThreads;
  for (int unit = int(threadIdx.x) / kWarpThreads; unit < 6 * s.channels; unit += kThreads / kWarpThreads) {
    const int dy = unit % 3;
    const A* map = m.input(fusion, unit / 3) + dy * s.across();
    double sums[3][4] = {};
    for (int64_t first = 0; first < s.pixels(); first += kShort) {
      const int64_t end = first + kShort < s.pixels() ? first + kShort : s.pixels();
      A part[3][4] = {};
      for (int64_t p = first + lane; p < end; p += kWarpThreads) {
        const A* slope = m.slope() + m.centre(int(p));
        const A d[4] = {slope[0], slope[s.bordered()], slope[2 * s.bordered()], slope[3 * s.bordered()]};
        WSSS_UNROLL
        for (int dx = 0; dx < 3; ++dx) {
          const A x = map[m.window(int(p)) + dx];
          WSSS_UNROLL
          for (int g = 0; g < 4; ++g) part[dx][g] += d[g] * positive(g < 2 ? x : -x);
        }
      }
      WSSS_UNROLL
      for (int i = 0; i < 12; ++i) sums[i / 4][i % 4] += double(part[i / 4][i % 4]);
    }
    WSSS_UNROLL
    for (int i = 0; i < 12; ++i) {
      double sum = sums[i / 4][i % 4];
      for (int d = kWarpThreads / 2; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
      if (lane == 0) parts[(unit * 3 + i / 4) * 4 + i % 4] = sum;
    }
  }
}

// Gradients of the coarser map (in place of that of the fused map) and of the level: through what the gates weigh, and
// through what they saw.
template <class A>
__device__ void input_gradients(const Maps<A>& m, int fusion, int k) {
  const Sizes& s = m.s;
  const auto* weight = reinterpret_cast<const Gates<A>*>(m.weight());
  const Gates<A>*to_a = weight + k * 9, *to_b = weight + (s.channels + k) * 9;
  for (int64_t first = 0; first < s.pixels(); first += kThreads * kPixels<A>) {
    const Group<A> group(m, first);
    A up[2][kPixels<A>] = {}, down[2][kPixels<A>] = {};
    WSSS_UNROLL
    for (int t = 0; t < 9; ++t) {
      const Gates<A> wa = to_a[t], wb = to_b[t];
      const int offset = (2 - t / 3) * s.across() + 2 - t % 3;
      WSSS_UNROLL
      for (int j = 0; j < kPixels<A>; ++j) {
        const A* d = m.slope() + group.window[j] + offset;
        const A d0 = d[0], d1 = d[s.bordered()], d2 = d[2 * s.bordered()], d3 = d[3 * s.bordered()];
        up[0][j] += wa.pos1 * d0 + wa.pos2 * d1;
        up[1][j] += wb.pos1 * d0 + wb.pos2 * d1;
        down[0][j] -= wa.neg1 * d2 + wa.neg2 * d3;
        down[1][j] -= wb.neg1 * d2 + wb.neg2 * d3;
      }
    }
    WSSS_UNROLL
    for (int j = 0; j < kPixels<A>; ++j) {
      if (!group.inside[j]) continue;
      const int64_t at = int64_t(k) * s.pixels() + group.pixel[j];
      const int64_t cell = k * s.bordered() + group.window[j] + s.across() + 1;
      const A half = A(.5) * m.gradient()[at];
      const A* gate = m.gate(fusion) + group.pixel[j];
      const auto through = [&](int g) { return half * gate[int64_t(g) * s.pixels()]; };
      m.gradient()[at] = choose(m.fused(fusion)[cell], up[0][j] + through(0), down[0][j] + through(2));
      m.finer()[at] = choose(m.level()[cell], up[1][j] + through(1), down[1][j] + through(3));
    }
  }
}

template <class T, class A>
__device__ void backward_sample(const Maps<A>& m, const Arguments<T>& call, int64_t sample) {
  const Sizes& s = m.s;
  forward_maps(m, call, call.feature + sample * s.maps(), true);
  pooling_adjoint(m, call, sample);
  for (int fusion = s.levels - 2; fusion >= 0; --fusion) {
    load_weights(m, call, fusion);
    interpolate(m, fusion + 1, m.level());
    gate_gradients(m, fusion);
    weight_gradients(m, fusion, call.parts + (sample * (s.levels - 1) + fusion) * 4 * s.inputs());
    for (int k = 0; k < s.channels; ++k) input_gradients(m, fusion, k);
    __syncthreads();
    level_adjoint(m, fusion + 1, m.finer());
  }
  level_adjoint(m, 0, m.gradient());
  for_each(s.maps(), [&](int64_t i) { call.grad_feature[sample * s.maps() + i] = T(m.total()[i]); });
  __syncthreads();
}

// work: null for shared memory, else the workspaces of all blocks.
template <class T, class A, bool kBackward>
__global__ void __launch_bounds__(kThreads, 1)
    pyramid(Arguments<T> call, Sizes sizes, Layout layout, unsigned char* work, int64_t work_bytes) {
  WSSS_DYNAMIC_SHARED(unsigned char, shared);
  const Maps<A> m(work ? work + blockIdx.x * work_bytes : shared, sizes, layout);
  prepare(m);
  for (int64_t sample = blockIdx.x; sample < call.batch; sample += gridDim.x) {
    if constexpr (kBackward)
      backward_sample(m, call, sample);
    else
      forward_sample(m, call, sample);
  }
}

// Adds the samples' parts in their order.
template <class T, class A>
__global__ void add_parts(const double* parts, int64_t batch, int64_t fusions, int64_t inputs, T* to_pos, T* to_neg) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, count = fusions * inputs * 4;
  if (i >= count) return;
  double sum = 0;
  for (int64_t b = 0; b < batch; ++b) sum += parts[b * count + i];
  const int64_t fusion = i / 4 / inputs, input = i / 4 % inputs;
  (i % 4 < 2 ? to_pos : to_neg)[(2 * fusion + i % 2) * inputs + input] = T(A(sum));
}

}  // namespace wsss::mpfp
