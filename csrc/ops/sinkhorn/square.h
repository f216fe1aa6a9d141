// …×N×N, as a stack of `batch` matrices.
#pragma once
#include "wsss/tensor.h"

namespace wsss {

struct Square {
  Tensor matrix;
  int64_t batch, n;
};

inline Square square(const char* op, const char* name, const Tensor& t) {
  const int64_t rank = t.dim(), n = rank >= 2 ? t.size(rank - 1) : 0;
  WSSS_CHECK(rank >= 2 && t.size(rank - 2) == n, op, ": ", name, " must be …×N×N");
  return {dense(t), n ? t.numel() / (n * n) : 0, n};
}

}  // namespace wsss
