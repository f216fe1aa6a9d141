// Lloyd's algorithm: threads, sums in a fixed order, convergence, registration.
#include <algorithm>
#include <cmath>
#include <tuple>

#include "wsss/tensor.h"

namespace wsss {
namespace kmeans {

constexpr int kBlock = 64;            // points of a packed block
constexpr int kLanes = 16;            // partial sums of a coordinate, at most: the values of the widest vector
constexpr int64_t kShare = 1024;      // points whose sums are formed by one thread, at least
constexpr int64_t kMaskedSums = 512;  // sums by masks up to this number of coordinates of all centroids

#define WSSS_CPU_KERNELS "ops/kmeans/kmeans_cpu.inc"
#include "wsss/cpu_kernels.h"

WSSS_PICK(pack_points)
WSSS_PICK(lloyd_share)

// One set of points with its centroids. The shares depend on sizes alone, so neither do the sums on the number of
// threads.
template <class T>
class Points {
 public:
  Points(const T* x, int64_t count, int64_t depth, int64_t k, T* centroid)
      : x_(x),
        count_(count),
        depth_(depth),
        k_(k),
        centroid_(centroid),
        blocks_((count + kBlock - 1) / kBlock * kBlock * depth) {
    share_ = std::max(kShare, (8 * k + kBlock - 1) / kBlock * kBlock);
    shares_ = (count + share_ - 1) / share_;
    masked_ = k <= 8 && k * depth <= kMaskedSums;
    sums_ = Buffer<double>(shares_ * k * depth);
    sizes_ = Buffer<double>(shares_ * k);
    parallel_for(0, shares_, 1, [&](int64_t b, int64_t e) {
      pack_points(T{})(x_, count_, depth_, b * share_ / kBlock, (std::min(count_, e * share_) + kBlock - 1) / kBlock,
                       blocks_.data());
    });
  }

  void labels(int64_t* label) { pass(label, false); }

  // Moves the centroids; returns the longest way that one went.
  double step() {
    pass(nullptr, true);
    double longest = 0.;
    for (int64_t a = 0; a < k_; ++a) {
      double size = 0., moved = 0.;
      for (int64_t s = 0; s < shares_; ++s) size += sizes_[s * k_ + a];
      for (int64_t c = 0; c < depth_ && size > 0.; ++c) {
        double sum = 0.;
        for (int64_t s = 0; s < shares_; ++s) sum += sums_[(s * k_ + a) * depth_ + c];
        T& at = centroid_[a * depth_ + c];
        const T next = T(sum / size);
        moved += (double(next) - double(at)) * (double(next) - double(at));
        at = next;
      }
      longest = std::max(longest, std::sqrt(moved));
    }
    return longest;
  }

 private:
  void pass(int64_t* label, bool sum) {
    parallel_for(0, shares_, 1, [&](int64_t b, int64_t e) {
      Buffer<T> lanes(sum && masked_ ? k_ * (depth_ + 1) * kLanes : 0);
      for (int64_t s = b; s < e; ++s)
        lloyd_share(T{})(x_, blocks_.data(), depth_, s * share_, std::min(count_, (s + 1) * share_), centroid_, k_,
                         label, sum ? sums_.data() + s * k_ * depth_ : nullptr, sizes_.data() + s * k_, lanes.data());
    });
  }

  const T* x_;
  int64_t count_, depth_, k_;
  T* centroid_;
  Buffer<T> blocks_;
  int64_t share_, shares_;
  bool masked_;
  Buffer<double> sums_, sizes_;
};

static std::tuple<Tensor, Tensor> fwd(const Tensor& x, const Tensor& init, int64_t num_iter, double tol) {
  WSSS_CHECK(x.dim() == 3 && init.dim() == 3 && x.size(0) == init.size(0) && x.size(2) == init.size(2) &&
                 x.scalar_type() == init.scalar_type() && init.size(1) > 0 && init.size(1) <= x.size(1) &&
                 x.size(2) > 0 && init.size(1) < (1 << 24),
             "kmeans: x B×N×d and init B×k×d of one dtype with k ≤ N expected");
  const int64_t images = x.size(0), n = x.size(1), d = x.size(2), k = init.size(1);
  Tensor label = new_empty(x, std::vector<int64_t>{images, n}, ScalarType::Long),
         centroid = new_empty(x, std::vector<int64_t>{images, k, d});
  const Tensor points = torch::stable::contiguous(x), start = torch::stable::contiguous(init);
  for_float_type("kmeans", x, [&](auto tag) {
    using T = decltype(tag);
    WSSS_PATH("kmeans.cpu");
    std::copy_n(in<T>(start), start.numel(), out<T>(centroid));
    const auto run = [&](int64_t b) {
      Points<T> set(in<T>(points) + b * n * d, n, d, k, out<T>(centroid) + b * k * d);
      for (int64_t i = 0; i < num_iter; ++i)
        if (set.step() <= tol) break;
      set.labels(out<int64_t>(label) + b * n);
    };
    if (n > 8 * kShare) {
      for (int64_t b = 0; b < images; ++b) run(b);
    } else {
      parallel_for(0, images, 1, [&](int64_t b, int64_t e) {
        for (; b < e; ++b) run(b);
      });
    }
  });
  return {label, centroid};
}

}  // namespace kmeans
}  // namespace wsss

STABLE_TORCH_LIBRARY_FRAGMENT(wsss, m) {
  m.def("kmeans_fwd(Tensor x, Tensor init, int num_iter, float tol) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(wsss, CPU, m) { m.impl("kmeans_fwd", TORCH_BOX(&wsss::kmeans::fwd)); }
