// One pass over a non-negative N×N matrix, and what is computed on the way: products with vectors from the right (row
// by row), then, with what the row products decide, products from the left. A normalisation A = diag(row)·M·diag(col)
// is only ever applied to vectors, so that neither it nor its powers exist as matrices.
#pragma once
#include <cstdint>

namespace wsss {

// Of Sinkhorn's sums: what is smaller has nothing to normalise and stays 0. The same for float64, so that the two
// precisions take the same decisions.
constexpr float kEmptySum = 1.17549435e-38f;

enum class LeftWeight {
  given,    // left[k][i], or 1 where left is null
  scaling,  // the new row scaling, 1 / (row sum), times left[k][i] if there is a left
  adjoint,  // the gradient of the row sums from the row scaling's
};

// Vectors that multiply the matrix have its type; sums, scalings and gradients of scalings are float64. They are few,
// and the gradient of the matrix is a small difference of large terms made of them.
template <class T>
struct MatrixPass {
  int64_t n = 0;
  const T* right = nullptr;  // [rights][n]
  int64_t rights = 0;
  double* product = nullptr;  // [rights][n]: M · right
  LeftWeight weight = LeftWeight::given;
  const T* left = nullptr;  // [lefts][n]
  int64_t lefts = 0;
  const double* row = nullptr;  // scaling: the previous row scaling (null: ones); adjoint: the row scaling
  double* written = nullptr;    // [n]: scaling: the new row scaling; adjoint: the gradient of the row sums
  T* normalised = nullptr;      // scaling: [n][n], diag(new row) · M · diag(right[0])
  // adjoint of a normalised matrix: grad is the gradient [n][n], col the column scaling. product[0] becomes
  // (grad ∘ M) · col, and the left product Σ_i (row_i grad_ij + written_i) M_ij.
  const T* grad = nullptr;
  const T* col = nullptr;
};

}  // namespace wsss
