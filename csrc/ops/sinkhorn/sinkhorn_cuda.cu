// Sinkhorn normalisation of CUDA tensors: arguments, one launch or several, registration.
#include <tuple>

#include "ops/sinkhorn/sinkhorn_kernels.cuh"
#include "ops/sinkhorn/square.h"
#include "wsss/cuda_tensor.h"

namespace wsss::sinkhorn {
namespace {

// Room for the sums of slices of rows, of one vector.
Tensor partials(const Tensor& like, int64_t n, int64_t batch) {
  return wsss::new_empty(like, {n > kBlockTokens && batch ? partial_sums(n, batch, 1) : 0}, ScalarType::Double);
}

// The scalings of every round in float64, B×2·num_iter×N: col_1, row_1, col_2, ...; and the normalised matrix where
// its tensor is given.
Tensor scale(const Square& square, int64_t num_iter, Tensor* normalised, const OnDevice& device) {
  const auto& [given, batch, n] = square;
  WSSS_CHECK(num_iter >= 0, "sinkhorn: num_iter must be at least 0, got ", num_iter);
  Tensor scales = wsss::new_empty(given, {batch, 2 * num_iter, n}, ScalarType::Double);
  const Tensor partial = partials(given, n, batch);
  if (batch && n)
    for_cuda_type("sinkhorn", given, [&, &given = given, batch = batch, n = n](auto tag) {
      using T = decltype(tag);
      T* to = normalised ? out<T>(*normalised) : nullptr;
      const Matrices<T> m{in<T>(given), n, batch};
      const Scalings s{out<double>(scales), n, num_iter, 2 * num_iter * n};
      if (n <= kBlockTokens && batch < (int64_t(1) << 31)) {
        WSSS_PATH("sinkhorn.cuda.block.fwd");
        launch(forward_block<T>, dim3(unsigned(batch)), dim3(kThreads), 0, device.stream(), m, s, to);
      } else {
        WSSS_PATH("sinkhorn.cuda.launches.fwd");
        forward(Launches<T>{m, device.stream(), out<double>(partial)}, m, s, to);
      }
    });
  return scales;
}

std::tuple<Tensor, Tensor> sinkhorn_fwd(const Tensor& matrix, int64_t num_iter) {
  const OnDevice device(matrix);
  const Square given = square("sinkhorn", "matrix", matrix);
  Tensor normalised = wsss::new_empty(matrix, sizes_of(matrix));
  const Tensor scales = scale(given, num_iter, &normalised, device);
  return {normalised, scales};
}

// The vectors (row, col), …×N, in float32 or float64; num_iter at least 1.
std::tuple<Tensor, Tensor> sinkhorn_scaling_fwd(const Tensor& matrix, int64_t num_iter) {
  const OnDevice device(matrix);
  const Square given = square("sinkhorn_scaling", "matrix", matrix);
  WSSS_CHECK(num_iter >= 1, "sinkhorn_scaling: num_iter must be at least 1, got ", num_iter);
  const Tensor scales = scale(given, num_iter, nullptr, device);
  std::vector<int64_t> sizes = sizes_of(matrix);
  sizes.pop_back();
  const bool wide = matrix.scalar_type() == ScalarType::Double;
  Tensor row = wsss::new_empty(matrix, sizes, wide ? ScalarType::Double : ScalarType::Float);
  Tensor col = wsss::new_empty(matrix, sizes, wide ? ScalarType::Double : ScalarType::Float);
  const int64_t count = given.batch * given.n;
  if (count) {
    const auto copy = [&](auto tag) {
      using T = decltype(tag);
      launch(last_scalings<T>, dim3(unsigned(blocks_for(count, kThreads))), dim3(kThreads), 0, device.stream(),
             in<double>(scales), given.n, num_iter, count, out<T>(row), out<T>(col));
    };
    wide ? copy(double{}) : copy(float{});
  }
  return {row, col};
}

Tensor sinkhorn_bwd(const Tensor& grad, const Tensor& matrix, const Tensor& scales) {
  const OnDevice device(matrix);
  const auto [given, batch, n] = square("sinkhorn", "matrix", matrix);
  const Tensor cotangent = dense(grad), saved = dense(scales);
  WSSS_CHECK(sizes_of(grad) == sizes_of(matrix), "sinkhorn: grad must have the shape of matrix");
  WSSS_CHECK(saved.dim() == 3 && saved.size(0) == batch && saved.size(2) == n && saved.size(1) % 2 == 0,
             "sinkhorn: scales must be B×2·num_iter×N");
  WSSS_CHECK(cotangent.scalar_type() == given.scalar_type() && saved.scalar_type() == ScalarType::Double,
             "sinkhorn: grad of the dtype of matrix and float64 scales expected");
  Tensor result = wsss::new_empty(given, sizes_of(matrix));
  const int64_t rounds = saved.size(1) / 2;
  const Tensor work = wsss::new_empty(given, {batch, 2 * rounds, n}, ScalarType::Double);
  const Tensor partial = partials(given, n, batch);
  if (batch && n)
    for_cuda_type("sinkhorn", given, [&, &given = given, batch = batch, n = n](auto tag) {
      using T = decltype(tag);
      const Matrices<T> m{in<T>(given), n, batch}, g{in<T>(cotangent), n, batch};
      const Adjoint a{out<double>(work), {const_cast<double*>(in<double>(saved)), n, rounds, 2 * rounds * n}};
      if (n <= kBlockTokens && batch < (int64_t(1) << 31)) {
        WSSS_PATH("sinkhorn.cuda.block.bwd");
        launch(backward_block<T>, dim3(unsigned(batch)), dim3(kThreads), 0, device.stream(), m, g, a, out<T>(result));
      } else {
        WSSS_PATH("sinkhorn.cuda.launches.bwd");
        backward(Launches<T>{m, device.stream(), out<double>(partial)}, g, a, out<T>(result));
      }
    });
  return result;
}

}  // namespace
}  // namespace wsss::sinkhorn

WSSS_CUDA_LIBRARY(m) {
  m.impl("sinkhorn_fwd", TORCH_BOX(&wsss::sinkhorn::sinkhorn_fwd));
  m.impl("sinkhorn_scaling_fwd", TORCH_BOX(&wsss::sinkhorn::sinkhorn_scaling_fwd));
  m.impl("sinkhorn_bwd", TORCH_BOX(&wsss::sinkhorn::sinkhorn_bwd));
}
