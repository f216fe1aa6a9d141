// What the random walk asks of its arguments, on every device.
#pragma once
#include <optional>

#include "wsss/tensor.h"

namespace wsss {

inline std::optional<Tensor> dense(const std::optional<Tensor>& t) {
  return t ? std::optional<Tensor>(dense(*t)) : std::nullopt;
}
inline void check_mask(const char* op, const Tensor& cam, const std::optional<Tensor>& mask) {
  WSSS_CHECK(!mask || (sizes_of(*mask) == sizes_of(cam) && mask->scalar_type() == cam.scalar_type()), op,
             ": mask must have the shape and the dtype of cam");
}

// Rows of the tape that the forward pass leaves: the scalings of every round, three vectors per class and step.
inline int64_t tape_rows(int64_t classes, int64_t rounds, int64_t power) {
  return power && classes ? 2 * rounds + 3 * classes * power : 0;
}

// Over a given affinity.
struct WalkShape {
  int64_t batch, classes, n, rounds, power;

  WalkShape(const Tensor& affinity, const Tensor& cam, const std::optional<Tensor>& mask, int64_t sinkhorn_iter,
            int64_t steps) {
    WSSS_CHECK(affinity.dim() == 3 && affinity.size(1) == affinity.size(2), "random_walk: affinity must be B×N×N");
    WSSS_CHECK(cam.dim() == 4 && cam.size(0) == affinity.size(0) && cam.size(2) * cam.size(3) == affinity.size(1),
               "random_walk: cam must be B×K×h×w with h·w = N");
    WSSS_CHECK(cam.scalar_type() == affinity.scalar_type(), "random_walk: one dtype expected");
    check_mask("random_walk", cam, mask);
    WSSS_CHECK(sinkhorn_iter >= 0 && steps >= 0, "random_walk: sinkhorn_iter and power must be at least 0");
    batch = cam.size(0);
    classes = cam.size(1);
    n = affinity.size(1);
    rounds = sinkhorn_iter;
    power = steps;
  }
  bool still() const { return power == 0 || classes == 0; }
  int64_t rows() const { return tape_rows(classes, rounds, power); }
  void check_tape(const Tensor& tape) const {
    WSSS_CHECK(tape.dim() == 3 && tape.size(0) == batch && tape.size(1) == rows() && tape.size(2) == n &&
                   tape.scalar_type() == ScalarType::Double,
               "random_walk: the tape does not belong to this call");
  }
};

}  // namespace wsss
