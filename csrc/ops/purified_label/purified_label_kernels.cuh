// The loss of purified labels on the GPU. An image's pixels are cut into tiles, one block each; what one launch finds
// of the tiles the next one joins in their order.
#pragma once
#include "wsss/cuda_block.h"

namespace wsss::purified_label {

constexpr int kThreads = 256;
constexpr int64_t kTilePixels = 2048;

struct Shape {
  int64_t batch, classes, pixels, tiles, ignore_index;
};

// What is known of the valid pixels of a tile, or of an image.
struct Seen {
  double smallest_loss;
  int64_t pixels, smallest_label, largest_label;
  __device__ bool single() const { return smallest_label == largest_label; }
};
// Σ e, Σ e · confidence · loss and Σ loss with e = exp(smallest loss − loss).
struct Sums {
  double mass, weighted, plain;
};

// A block's tile.
struct Tile {
  int64_t image, begin, end;
  __device__ explicit Tile(const Shape& s)
      : image(blockIdx.x / s.tiles), begin(blockIdx.x % s.tiles * kTilePixels), end(begin + kTilePixels) {
    end = end < s.pixels ? end : s.pixels;
  }
};

template <class F>
__device__ __forceinline__ void for_each(int64_t begin, int64_t end, const F& body) {
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) body(i);
}

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float logarithm(float x) { return logf(x); }
__device__ __forceinline__ double logarithm(double x) { return log(x); }

// The softmax over the classes of one pixel.
template <class A>
struct Softmax {
  A high, low, sum;

  template <class T>
  __device__ Softmax(const T* logit, const Shape& s) : high(A(logit[0])), low(high), sum(0) {
    for (int64_t c = 1; c < s.classes; ++c) {
      const A x = A(logit[c * s.pixels]);
      high = x > high ? x : high;
      low = x < low ? x : low;
    }
    for (int64_t c = 0; c < s.classes; ++c) sum += exponential(A(logit[c * s.pixels]) - high);
  }
};

// Joins what is seen of single pixels, or of tiles.
template <class F>
__device__ Seen join_seen(int64_t begin, int64_t end, const F& value) {
  Seen all{double(INFINITY), 0, INT64_MAX, INT64_MIN};
  for_each(begin, end, [&](int64_t i) {
    const Seen v = value(i);
    if (v.pixels == 0) return;
    all.smallest_loss = v.smallest_loss < all.smallest_loss ? v.smallest_loss : all.smallest_loss;
    all.pixels += v.pixels;
    all.smallest_label = v.smallest_label < all.smallest_label ? v.smallest_label : all.smallest_label;
    all.largest_label = v.largest_label > all.largest_label ? v.largest_label : all.largest_label;
  });
  return {block_min(all.smallest_loss), block_sum(all.pixels), block_min(all.smallest_label),
          block_max(all.largest_label)};
}

// Loss and confidence of each pixel; −1 is the confidence of ignored ones. A label that is no class makes the loss NaN.
template <class T, class A>
__global__ void __launch_bounds__(kThreads, 1)
    find_losses(const T* logit, const int64_t* label, A* loss, A* confidence, Seen* seen, Shape s) {
  const Tile tile(s);
  const A nan = A(__uint_as_float(0x7fffffff));
  logit += tile.image * s.classes * s.pixels;
  const Seen all = join_seen(tile.begin, tile.end, [&](int64_t p) {
    const int64_t at = tile.image * s.pixels + p, own = label[at];
    if (own == s.ignore_index) {
      loss[at] = 0;
      confidence[at] = -1;
      return Seen{0., 0, 0, 0};
    }
    const Softmax<A> softmax(logit + p, s);
    const bool known = own >= 0 && own < s.classes;
    const A target = known ? A(logit[own * s.pixels + p]) : nan;
    loss[at] = logarithm(softmax.sum) - (target - softmax.high);
    confidence[at] = (A(1) - exponential(softmax.low - softmax.high)) / softmax.sum;
    return Seen{double(loss[at]), 1, own, own};
  });
  if (threadIdx.x == 0) seen[blockIdx.x] = all;
}

__device__ __forceinline__ Seen seen_of_image(const Seen* seen, const Shape& s, int64_t image) {
  return join_seen(0, s.tiles, [&](int64_t i) { return seen[image * s.tiles + i]; });
}

template <class A>
__global__ void __launch_bounds__(kThreads, 1)
    sum_tiles(const A* loss, const A* confidence, const Seen* seen, Sums* sums, Shape s) {
  const Tile tile(s);
  const A smallest = A(seen_of_image(seen, s, tile.image).smallest_loss);
  Sums all{0., 0., 0.};
  for_each(tile.begin, tile.end, [&](int64_t p) {
    const int64_t at = tile.image * s.pixels + p;
    if (confidence[at] < A(0)) return;
    const A e = exponential(smallest - loss[at]);
    all.mass += double(e);
    all.weighted += double(e * confidence[at]) * double(loss[at]);
    all.plain += double(loss[at]);
  });
  all = {block_sum(all.mass), block_sum(all.weighted), block_sum(all.plain)};
  if (threadIdx.x == 0) sums[blockIdx.x] = all;
}

template <class F>
__device__ double sum_of_tiles(const Sums* sums, const Shape& s, int64_t image, const F& part) {
  double sum = 0;
  for_each(0, s.tiles, [&](int64_t i) { sum += part(sums[image * s.tiles + i]); });
  return block_sum(sum);
}

// The factor of each pixel's loss in the result.
template <class A>
__global__ void __launch_bounds__(kThreads, 1)
    write_weights(const A* loss, const A* confidence, const Seen* seen, const Sums* sums, A* weight, Shape s) {
  const Tile tile(s);
  const Seen all = seen_of_image(seen, s, tile.image);
  const double mass = sum_of_tiles(sums, s, tile.image, [](const Sums& part) { return part.mass; });
  const A factor = A(1. / (double(s.batch) * (all.single() ? double(all.pixels) : mass)));
  const A smallest = A(all.smallest_loss);
  for_each(tile.begin, tile.end, [&](int64_t p) {
    const int64_t at = tile.image * s.pixels + p;
    const A w = all.single() ? factor : factor * exponential(smallest - loss[at]) * confidence[at];
    weight[at] = confidence[at] < A(0) ? A(0) : w;
  });
}

// One block: the mean over the images, in their order.
template <class A>
__global__ void __launch_bounds__(kThreads, 1) finish_loss(const Seen* seen, const Sums* sums, A* result, Shape s) {
  double total = 0;
  for (int64_t image = 0; image < s.batch; ++image) {
    const Seen all = seen_of_image(seen, s, image);
    const double mass = sum_of_tiles(sums, s, image, [](const Sums& part) { return part.mass; });
    const double weighted = sum_of_tiles(sums, s, image, [](const Sums& part) { return part.weighted; });
    const double plain = sum_of_tiles(sums, s, image, [](const Sums& part) { return part.plain; });
    if (all.pixels > 0) total += all.single() ? plain / double(all.pixels) : weighted / mass;
  }
  if (threadIdx.x == 0) result[0] = A(s.batch ? total / double(s.batch) : 0.);
}

// dlogit = grad · weight · (softmax − one-hot).
template <class T, class A>
__global__ void __launch_bounds__(kThreads, 1)
    loss_gradient(const T* logit, const int64_t* label, const A* weight, const A* grad, T* to, Shape s) {
  const Tile tile(s);
  for_each(tile.begin, tile.end, [&](int64_t p) {
    const int64_t at = tile.image * s.pixels + p, first = tile.image * s.classes * s.pixels + p, own = label[at];
    if (weight[at] == A(0)) {
      for (int64_t c = 0; c < s.classes; ++c) to[first + c * s.pixels] = T(A(0));
      return;
    }
    const A w = grad[0] * weight[at];
    const Softmax<A> softmax(logit + first, s);
    for (int64_t c = 0; c < s.classes; ++c) {
      const A share = exponential(A(logit[first + c * s.pixels]) - softmax.high) / softmax.sum;
      to[first + c * s.pixels] = T(w * (share - (own == c ? A(1) : A(0))));
    }
  });
}

}  // namespace wsss::purified_label
