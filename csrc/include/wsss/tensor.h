// What the stable-ABI operators share: short names, dtype dispatch, parallel loops whose errors keep their text.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <exception>
#include <mutex>
#include <vector>

#include "wsss/buffer.h"
#include "wsss/check.h"
#include "wsss/cpu_level.h"
#include "wsss/path.h"

namespace wsss {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A new, uninitialised, contiguous tensor of like's device, and of its dtype where none is given.
inline Tensor new_empty(const Tensor& like, std::vector<int64_t> size) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(size.data(), size.size()));
}
inline Tensor new_empty(const Tensor& like, std::vector<int64_t> size, ScalarType dtype) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(size.data(), size.size()), dtype);
}

// torch::stable::contiguous, without its way through the dispatcher where there is nothing to copy.
inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }
inline std::vector<int64_t> sizes_of(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

template <class T>
const T* in(const Tensor& t) {
  return t.numel() ? t.const_data_ptr<T>() : nullptr;
}
template <class T>
T* out(const Tensor& t) {
  return t.numel() ? t.mutable_data_ptr<T>() : nullptr;
}

// body(tag) with tag a value of the element type. CPU kernels exist for float and double; the Python wrappers widen
// half types before the call.
template <class F>
void for_float_type(const char* op, const Tensor& t, const F& body) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return body(float{});
    case ScalarType::Double: return body(double{});
    default:
      fail("wsss_kernels: ", op, ": float32 or float64 expected, got ", torch::headeronly::toString(t.scalar_type()));
  }
}

// torch's own thread pool. How [begin, end) is cut must never change the result: give every index its own output.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& body) {
  std::exception_ptr error;
  std::mutex mutex;
  torch::stable::parallel_for(begin, end, grain, [&](int64_t b, int64_t e) {
    try {
      body(b, e);
    } catch (...) {  // crossing the C ABI would lose the text
      std::lock_guard<std::mutex> lock(mutex);
      if (!error) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

}  // namespace wsss
