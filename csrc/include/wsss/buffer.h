// Workspace of the CPU kernels: 64-byte aligned, accounted for (so that tests can hold an operator to its memory
// promise), and filled with NaN under WSSS_POISON=1 (so that a cell that is read before it is written shows).
#pragma once
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace wsss {

struct WorkspaceUse {
  std::atomic<int64_t> now{0}, peak{0};
  void add(int64_t bytes) {
    const int64_t use = now.fetch_add(bytes) + bytes;
    int64_t seen = peak.load();
    while (seen < use && !peak.compare_exchange_weak(seen, use)) {
    }
  }
};

inline WorkspaceUse& workspace_use() {
  static WorkspaceUse use;
  return use;
}

template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count) { allocate(count); }
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    swap(other);
    return *this;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
    if (data_) workspace_use().add(-bytes_);
    std::free(data_);
  }

  T* data() { return data_; }
  const T* data() const { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }
  int64_t size() const { return count_; }

 private:
  void allocate(int64_t count) {
    if (count <= 0) return;
    constexpr int64_t kHuge = 2 << 20, kLine = 64;
    bytes_ = (count * int64_t(sizeof(T)) + kLine - 1) / kLine * kLine;
    void* memory = nullptr;
    if (posix_memalign(&memory, size_t(bytes_ >= 2 * kHuge ? kHuge : kLine), size_t(bytes_))) throw std::bad_alloc();
    data_ = static_cast<T*>(memory);
#if defined(__linux__)
    // A workspace of many megabytes costs more in page faults than in work; huge pages take 512 times fewer. Whole ones
    // only: the rest of the last would be memory that nobody asked for.
    if (bytes_ >= 2 * kHuge) madvise(memory, size_t(bytes_ / kHuge * kHuge), MADV_HUGEPAGE);
#endif
    const char* poison = std::getenv("WSSS_POISON");
    if (poison && *poison == '1') std::memset(static_cast<void*>(data_), 0xff, size_t(bytes_));
    count_ = count;
    workspace_use().add(bytes_);
  }
  void swap(Buffer& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(count_, other.count_);
    std::swap(bytes_, other.bytes_);
  }
  T* data_ = nullptr;
  int64_t count_ = 0, bytes_ = 0;
};

}  // namespace wsss
