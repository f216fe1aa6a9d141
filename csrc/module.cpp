// The extension module: importing it registers the operators, and it answers questions that are not about tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "wsss/buffer.h"
#include "wsss/cpu_level.h"
#include "wsss/path.h"

#ifndef WSSS_BUILD_INFO
#define WSSS_BUILD_INFO "unknown"
#endif

extern "C" __attribute__((visibility("default"))) int64_t wsss_workspace_peak(bool reset) {
  auto& use = wsss::workspace_use();
  const int64_t peak = use.peak.load();
  if (reset) use.peak.store(use.now.load());
  return peak;
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native part of wsss_kernels. Importing it registers the operators wsss::*.";
  m.def(
      "cpu_capability", [] { return wsss::cpu_level_name(wsss::cpu_level()); },
      "Instruction-set level of the CPU kernels: default, avx2 or avx512.");
  m.def("build_info", [] { return WSSS_BUILD_INFO; }, "Compiler and PyTorch that built this module.");
  m.def("paths", [] { return wsss::path_log().names; }, "Launch paths taken so far (for the path coverage test).");
  m.def(
      "workspace_peak", [](bool reset) { return wsss_workspace_peak(reset); }, pybind11::arg("reset") = false,
      "Peak bytes of kernel workspace since the last reset.");
}
