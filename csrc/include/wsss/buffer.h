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

// Workspaces that this thread has given back, for its next call: memory fresh from the system costs a page fault every
// 4 KiB or 2 MiB, more than the work of many a call, and tens of milliseconds in a virtual machine whose host takes
// back what the guest frees. At most 64 MiB, the oldest make room. Not under a sanitizer, which would no longer see
// that a workspace is used after its end.
class Spares {
 public:
  static constexpr int64_t kLeast = 64 << 10, kMost = 64 << 20, kTotal = 64 << 20;
  static Spares& mine() {
    static thread_local Spares spares;
    return spares;
  }
  Spares() = default;
  Spares(const Spares&) = delete;
  Spares& operator=(const Spares&) = delete;
  ~Spares() {
    while (count_) drop(0);
  }

  // A block of at least and less than twice this size, or null; its size is left in `bytes`.
  void* take(int64_t& bytes) {
    for (int i = count_ - 1; i >= 0; --i)
      if (blocks_[i].bytes >= bytes && blocks_[i].bytes / 2 < bytes) {
        bytes = blocks_[i].bytes;
        return remove(i);
      }
    return nullptr;
  }
  void give(void* memory, int64_t bytes) {
#ifdef __SANITIZE_ADDRESS__
    return std::free(memory);
#endif
    if (bytes < kLeast || bytes > kMost) return std::free(memory);
    while (count_ == kBlocks || total_ + bytes > kTotal) drop(0);
    blocks_[count_++] = {memory, bytes};
    total_ += bytes;
  }

 private:
  static constexpr int kBlocks = 32;
  struct Block {
    void* memory;
    int64_t bytes;
  };
  void* remove(int i) {
    void* memory = blocks_[i].memory;
    total_ -= blocks_[i].bytes;
    for (--count_; i < count_; ++i) blocks_[i] = blocks_[i + 1];
    return memory;
  }
  void drop(int i) { std::free(remove(i)); }
  Block blocks_[kBlocks];
  int count_ = 0;
  int64_t total_ = 0;
};

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
    if (!data_) return;
    workspace_use().add(-bytes_);
    Spares::mine().give(data_, capacity_);
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
    capacity_ = bytes_ = (count * int64_t(sizeof(T)) + kLine - 1) / kLine * kLine;
    void* memory = Spares::mine().take(capacity_);
    if (!memory) {
      if (posix_memalign(&memory, size_t(bytes_ >= 2 * kHuge ? kHuge : kLine), size_t(bytes_))) throw std::bad_alloc();
#if defined(__linux__)
      // Huge pages take 512 times fewer faults. Whole ones only: the rest of the last would be memory that nobody asked
      // for.
      if (bytes_ >= 2 * kHuge) madvise(memory, size_t(bytes_ / kHuge * kHuge), MADV_HUGEPAGE);
#endif
    }
    data_ = static_cast<T*>(memory);
    const char* poison = std::getenv("WSSS_POISON");
    if (poison && *poison == '1') std::memset(static_cast<void*>(data_), 0xff, size_t(bytes_));
    count_ = count;
    workspace_use().add(bytes_);
  }
  void swap(Buffer& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(count_, other.count_);
    std::swap(bytes_, other.bytes_);
    std::swap(capacity_, other.capacity_);
  }
  T* data_ = nullptr;
  int64_t count_ = 0, bytes_ = 0, capacity_ = 0;
};

}  // namespace wsss
