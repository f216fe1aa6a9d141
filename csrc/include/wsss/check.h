// Errors of the native layer. The Python wrappers validate first and raise TypeError or ValueError; what is checked
// here protects memory when a raw operator is called directly.
#pragma once
#include <sstream>
#include <stdexcept>

namespace wsss {

template <class... A>
[[noreturn]] inline void fail(const A&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  // runtime_error is the one type whose text reaches Python unchanged on every supported PyTorch.
  throw std::runtime_error(text.str());
}

}  // namespace wsss

#define WSSS_CHECK(condition, ...)                                 \
  do {                                                             \
    if (!(condition)) ::wsss::fail("wsss_kernels: ", __VA_ARGS__); \
  } while (0)
