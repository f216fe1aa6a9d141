// What purified_label_loss asks of its arguments, on every device.
#pragma once
#include "wsss/tensor.h"

namespace wsss {
namespace purified_label {

inline void check_maps(const Tensor& logit, const Tensor& label) {
  WSSS_CHECK(logit.dim() == 4 && label.dim() == 3 && logit.size(0) == label.size(0) && logit.size(1) > 0 &&
                 logit.size(2) == label.size(1) && logit.size(3) == label.size(2) &&
                 label.scalar_type() == ScalarType::Long,
             "purified_label_loss: logit B×C×H×W with at least one class and label B×H×W (int64) expected");
  WSSS_CHECK(logit.size(2) > 0 && logit.size(3) > 0, "purified_label_loss: a map must not be empty");
}

}  // namespace purified_label
}  // namespace wsss
