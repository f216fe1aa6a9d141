// Sinkhorn normalisation of CUDA tensors: arguments, one launch or several, registration.
#include <tuple>

#include "ops/sinkhorn/sinkhorn_kernels.cuh"
#include "wsss/cuda_tensor.h"

namespace wsss::sinkhorn {
namespace {

Tensor square(const char* name, const Tensor& t) {
  WSSS_CHECK(t.dim() == 3 && t.size(1) == t.size(2), "sinkhorn: ", name, " must be B×N×N");
  return dense(t);
}

// The normalised matrix and the scalings of every round in float64, B×2·num_iter×N: col_1, row_1, col_2, ...
std::tuple<Tensor, Tensor> sinkhorn_fwd(const Tensor& matrix, int64_t num_iter, bool write) {
  const OnDevice device(matrix);
  const Tensor given = square("matrix", matrix);
  const int64_t batch = given.size(0), n = given.size(1);
  WSSS_CHECK(num_iter >= 0, "sinkhorn: num_iter must be at least 0, got ", num_iter);
  Tensor normalised = wsss::new_empty(given, {write ? batch : 0, n, n});
  Tensor scales = wsss::new_empty(given, {batch, 2 * num_iter, n}, ScalarType::Double);
  if (batch && n)
    for_cuda_type("sinkhorn", given, [&](auto tag) {
      using T = decltype(tag);
      const Matrices<T> m{in<T>(given), n, batch};
      const Scalings s{out<double>(scales), n, num_iter, 2 * num_iter * n};
      if (n <= kBlockTokens && batch < (int64_t(1) << 31)) {
        WSSS_PATH("sinkhorn.cuda.block.fwd");
        launch(forward_block<T>, dim3(unsigned(batch)), dim3(kThreads), 0, device.stream(), m, s, out<T>(normalised));
      } else {
        WSSS_PATH("sinkhorn.cuda.launches.fwd");
        forward(Launches<T>{m, device.stream()}, m, s, out<T>(normalised));
      }
    });
  return {normalised, scales};
}

Tensor sinkhorn_bwd(const Tensor& grad, const Tensor& matrix, const Tensor& scales) {
  const OnDevice device(matrix);
  const Tensor given = square("matrix", matrix), cotangent = square("grad", grad), saved = dense(scales);
  const int64_t batch = given.size(0), n = given.size(1);
  WSSS_CHECK(cotangent.size(0) == batch && cotangent.size(1) == n, "sinkhorn: grad must have the shape of matrix");
  WSSS_CHECK(saved.dim() == 3 && saved.size(0) == batch && saved.size(2) == n && saved.size(1) % 2 == 0,
             "sinkhorn: scales must be B×2·num_iter×N");
  WSSS_CHECK(cotangent.scalar_type() == given.scalar_type() && saved.scalar_type() == ScalarType::Double,
             "sinkhorn: grad of the dtype of matrix and float64 scales expected");
  Tensor result = wsss::new_empty(given, {batch, n, n});
  const int64_t rounds = saved.size(1) / 2;
  const Tensor work = wsss::new_empty(given, {batch, 2 * rounds, n}, ScalarType::Double);
  if (batch && n)
    for_cuda_type("sinkhorn", given, [&](auto tag) {
      using T = decltype(tag);
      const Matrices<T> m{in<T>(given), n, batch}, g{in<T>(cotangent), n, batch};
      const Adjoint a{out<double>(work), {const_cast<double*>(in<double>(saved)), n, rounds, 2 * rounds * n}};
      if (n <= kBlockTokens && batch < (int64_t(1) << 31)) {
        WSSS_PATH("sinkhorn.cuda.block.bwd");
        launch(backward_block<T>, dim3(unsigned(batch)), dim3(kThreads), 0, device.stream(), m, g, a, out<T>(result));
      } else {
        WSSS_PATH("sinkhorn.cuda.launches.bwd");
        backward(Launches<T>{m, device.stream()}, g, a, out<T>(result));
      }
    });
  return result;
}

}  // namespace
}  // namespace wsss::sinkhorn

WSSS_CUDA_LIBRARY(m) {
  m.impl("sinkhorn_fwd", TORCH_BOX(&wsss::sinkhorn::sinkhorn_fwd));
  m.impl("sinkhorn_bwd", TORCH_BOX(&wsss::sinkhorn::sinkhorn_bwd));
}
