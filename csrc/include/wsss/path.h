// WSSS_PATH("par.f32.interior"): a launcher says which of its paths it takes. Tests assert that the samples of an
// operator took every path that its spec lists. After the first pass the cost is one relaxed load.
#pragma once
#include <atomic>
#include <mutex>
#include <set>
#include <string>

namespace wsss {

struct PathLog {
  std::mutex mutex;
  std::set<std::string> names;
};

inline PathLog& path_log() {
  static PathLog log;
  return log;
}

inline void report_path(std::atomic<bool>& seen, const char* name) {
  if (seen.load(std::memory_order_relaxed)) return;
  std::lock_guard<std::mutex> lock(path_log().mutex);
  path_log().names.insert(name);
  seen.store(true, std::memory_order_relaxed);
}

}  // namespace wsss

#define WSSS_PATH(name)                         \
  do {                                          \
    static std::atomic<bool> wsss_seen_{false}; \
    ::wsss::report_path(wsss_seen_, name);      \
  } while (0)
