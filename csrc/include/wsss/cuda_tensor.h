// What <op>_cuda.cu files share. The same file becomes, under nvcc, the operators wsss::<op> for CUDA tensors, and
// under a C++ compiler with -DWSSS_EMULATE a library for tests, wsss_emul::<op> for CPU tensors:
//   WSSS_CUDA_LIBRARY(m) { m.impl("par_fwd", TORCH_BOX(&par_fwd)); }
// Schemas are defined elsewhere: in <op>_ops.cpp for wsss, by the Python package for wsss_emul.
#pragma once
#include "wsss/cuda.h"
#include "wsss/tensor.h"
#if defined(WSSS_EMULATE)
#define WSSS_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(wsss_emul, CPU, m)
#else
#include <torch/csrc/stable/accelerator.h>
#define WSSS_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(wsss, CUDA, m)
#endif

namespace wsss {

// body(tag) with tag a value of the element type.
template <class F>
void for_cuda_type(const char* op, const Tensor& t, const F& body) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return body(float{});
    case ScalarType::Double: return body(double{});
    case ScalarType::Half: return body(c10::Half{});
    case ScalarType::BFloat16: return body(c10::BFloat16{});
    default:
      fail("wsss_kernels: ", op, ": float32, float64, float16 or bfloat16 expected, got ",
           torch::headeronly::toString(t.scalar_type()));
  }
}

// What a kernel accumulates in.
template <class T>
struct accumulator {
  using type = float;
};
template <>
struct accumulator<double> {
  using type = double;
};
template <class T>
using accumulator_t = typename accumulator<T>::type;

// Makes the tensor's device current for the scope, and knows its current stream.
class OnDevice {
 public:
#if defined(WSSS_EMULATE)
  explicit OnDevice(const Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
#else
  explicit OnDevice(const Tensor& t) : guard_(t.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
#endif
};

inline std::string& path_text() {
  static std::string text;
  return text;
}

}  // namespace wsss

// The launch paths that this library's kernels have taken, one a line. For tests, through ctypes; valid until the next
// call.
extern "C" __attribute__((visibility("default"), used)) inline const char* wsss_paths() {
  std::lock_guard<std::mutex> lock(wsss::path_log().mutex);
  std::string& text = wsss::path_text();
  text.clear();
  for (const std::string& name : wsss::path_log().names) text += name + "\n";
  return text.c_str();
}
