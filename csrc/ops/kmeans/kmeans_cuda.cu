// Lloyd's algorithm of CUDA tensors: arguments, how a set is cut, launches, registration.
#include <tuple>

#include "ops/kmeans/kmeans_kernels.cuh"
#include "wsss/cuda_tensor.h"

namespace wsss::kmeans {
namespace {

constexpr int64_t kBlockPoints = 4096;  // of a set that is one block's
constexpr int64_t kSharePoints = 1024, kMostShares = 256;
constexpr size_t kSumsBytes = 64 << 10, kCentroidBytes = 32 << 10;

// Depends on sizes alone, and so do the sums.
Shape shape_of(const Tensor& x, const Tensor& init, size_t cell) {
  Shape s{};
  s.count = x.size(1);
  s.depth = x.size(2);
  s.k = int(init.size(1));
  s.share = std::max({kSharePoints, 8 * int64_t(s.k), blocks_for(s.count, kMostShares)});
  s.shares = blocks_for(s.count, s.share);
  s.columns = int(std::min<int64_t>(s.depth, kThreads));
  const size_t group = size_t(s.cells()) * sizeof(double) + size_t(s.k) * sizeof(int);
  s.groups = int(std::min<size_t>(size_t(kThreads / s.columns), kSumsBytes / group));
  s.near_centroids = size_t(s.cells()) * cell <= kCentroidBytes;
  return s;
}

template <class T>
class Lloyd {
 public:
  using A = accumulator_t<T>;
  Lloyd(const Tensor& x, const Tensor& init, const Tensor& label, const Tensor& centroid, cudaStream_t stream)
      : like_(x),
        shape_(shape_of(x, init, sizeof(A))),
        sets_(x.size(0)),
        x_(in<T>(x)),
        start_(in<T>(init)),
        label_(out<int64_t>(label)),
        centroid_(out<T>(centroid)),
        stream_(stream) {}

  void run(int64_t iterations, double tol) {
    const size_t shared = shape_.shared_bytes(sizeof(A));
    if (shape_.count <= kBlockPoints && shape_.groups > 0 && shape_.near_centroids && sets_ < (int64_t(1) << 31)) {
      WSSS_PATH("kmeans.cuda.block");
      launch(lloyd_block<T, A>, dim3(unsigned(sets_)), dim3(kThreads), shared, stream_, x_, start_, label_, centroid_,
             shape_, iterations, tol);
      return;
    }
    if (shape_.groups > 0) {
      WSSS_PATH("kmeans.cuda.shares");
    } else {
      WSSS_PATH("kmeans.cuda.shares.sums_in_memory");
    }
    in_shares(iterations, tol, shared);
  }

 private:
  void in_shares(int64_t iterations, double tol, size_t shared) {
    const int64_t cells = sets_ * shape_.cells(), blocks = sets_ * shape_.shares;
    WSSS_CHECK(blocks < (int64_t(1) << 31), "kmeans: too many points");
    const Tensor sums = new_empty(like_, {blocks * shape_.cells()}, ScalarType::Double);
    const Tensor counts = new_empty(like_, {blocks * shape_.k}, ScalarType::Int);
    const Tensor moving = new_empty(like_, {sets_}, ScalarType::Int);
    const Tensor centre = new_empty(like_, {cells}, sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float);
    const dim3 each(static_cast<unsigned>(blocks)), block(kThreads);
    launch(lloyd_start<T, A>, dim3(unsigned(blocks_for(cells, kThreads))), block, 0, stream_, start_, out<A>(centre),
           out<int>(moving), cells, sets_);
    for (int64_t i = 0; i < iterations; ++i) {
      launch(lloyd_share<T, A>, each, block, shared, stream_, x_, in<A>(centre), label_, out<double>(sums),
             out<int>(counts), in<int>(moving), shape_);
      launch(lloyd_move<A>, dim3(unsigned(sets_)), block, 0, stream_, out<double>(sums), out<int>(counts),
             out<A>(centre), out<int>(moving), shape_, tol);
    }
    launch(lloyd_finish<T, A>, each, block, shared, stream_, x_, in<A>(centre), label_, centroid_, shape_);
  }

  const Tensor& like_;
  const Shape shape_;
  const int64_t sets_;
  const T *x_, *start_;
  int64_t* label_;
  T* centroid_;
  const cudaStream_t stream_;
};

std::tuple<Tensor, Tensor> fwd(const Tensor& x, const Tensor& init, int64_t num_iter, double tol) {
  WSSS_CHECK(x.dim() == 3 && init.dim() == 3 && x.size(0) == init.size(0) && x.size(2) == init.size(2) &&
                 x.scalar_type() == init.scalar_type() && init.size(1) > 0 && init.size(1) <= x.size(1) &&
                 x.size(2) > 0 && init.size(1) < (1 << 24),
             "kmeans: x B×N×d and init B×k×d of one dtype with k ≤ N expected");
  const OnDevice device(x);
  const Tensor points = dense(x), start = dense(init);
  Tensor label = new_empty(x, std::vector<int64_t>{x.size(0), x.size(1)}, ScalarType::Long);
  Tensor centroid = new_empty(x, sizes_of(init));
  if (x.size(0))
    for_cuda_type("kmeans", x, [&](auto tag) {
      Lloyd<decltype(tag)>(points, start, label, centroid, device.stream()).run(num_iter, tol);
    });
  return {label, centroid};
}

}  // namespace
}  // namespace wsss::kmeans

WSSS_CUDA_LIBRARY(m) { m.impl("kmeans_fwd", TORCH_BOX(&wsss::kmeans::fwd)); }
