// Runs CUDA kernels on the host: the scheduler. What kernels call is in cuda_emulator_device.h; include wsss/cuda.h.
//
// Every CUDA thread of a block is a fiber (a stack of its own in one operating-system thread); a thread that waits at a
// barrier or a warp collective hands over to the next. Threads that never wait run one after another on one stack.
// WSSS_EMULATOR_ORDER, read at each launch, is the order in which threads and blocks run: `forward` (default),
// `reverse`, or a number that seeds a random order, in which threads are also interrupted at atomics.
//
// Found in one or another order: a missing __syncthreads or __syncwarp, a read before an asynchronous copy has arrived.
// Reported as errors: barriers that some threads of the block do not reach (divergence, early exit), collectives whose
// lanes disagree, impossible launches. Uninitialised shared memory holds NaN (all bits set); so does what a shuffle
// reads from a lane that does not take part. Under AddressSanitizer every access outside a global or shared array is
// reported (plain `__shared__` arrays only as far as the compiler fences static variables). Not found, because blocks
// run one after another and threads switch at known points only: races between blocks, memory ordering, too many
// registers, alignment below the host's. Device arithmetic is the host's.
#pragma once
#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "wsss/check.h"
#if defined(__x86_64__) && !defined(WSSS_EMULATOR_UCONTEXT)
#define WSSS_EMULATOR_ASSEMBLY 1
#else
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#define WSSS_EMULATOR_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define WSSS_EMULATOR_ASAN 1
#endif
#endif
#if defined(WSSS_EMULATOR_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace wsss::emulator {

// A suspended flow of control with its stack.
class Fiber {
 public:
  Fiber() = default;  // the operating-system thread's own
  Fiber(size_t bytes, void (*entry)()) : size_(bytes) {
    void* memory =
        mmap(nullptr, kGuard + bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, kGuard, PROT_NONE);  // an overflow stops the program instead of writing into the next stack
    stack_ = static_cast<char*>(memory) + kGuard;
    prepare(entry);
  }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber() {
    if (stack_) munmap(stack_ - kGuard, kGuard + size_);
  }

  static void switch_over(Fiber& from, Fiber& to) {
#if defined(WSSS_EMULATOR_ASAN)
    if (!from.stack_) from.find_own_stack();
    __sanitizer_start_switch_fiber(&from.fake_stack_, to.bottom(), to.size_);
#endif
#if defined(WSSS_EMULATOR_ASSEMBLY)
    exchange_stacks(&from.pointer_, to.pointer_);
#else
    swapcontext(&from.context_, &to.context_);
#endif
#if defined(WSSS_EMULATOR_ASAN)
    __sanitizer_finish_switch_fiber(from.fake_stack_, nullptr, nullptr);
#endif
  }
  // To be called first on a new stack.
  static void arrived() {
#if defined(WSSS_EMULATOR_ASAN)
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  }

 private:
  static constexpr size_t kGuard = 64 << 10;

  void prepare(void (*entry)()) {
#if defined(WSSS_EMULATOR_ASAN)
    __asan_unpoison_memory_region(stack_, size_);
#endif
#if defined(WSSS_EMULATOR_ASSEMBLY)
    // Stacks lie at multiples of the page size; without this shift their hot ends would share a few cache sets.
    const size_t shift = (reinterpret_cast<uintptr_t>(stack_) / size_ % 37) * 192;
    void** top = reinterpret_cast<void**>(stack_ + size_ - shift);
    *--top = nullptr;  // where entry would return to; keeps the alignment that a called function expects
    *--top = reinterpret_cast<void*>(entry);
    pointer_ = top - 6;
    std::memset(pointer_, 0, 6 * sizeof(void*));
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_;
    context_.uc_stack.ss_size = size_;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#endif
  }

#if defined(WSSS_EMULATOR_ASSEMBLY)
  // Saves what a called function must preserve, leaves this stack and continues on the other: a few nanoseconds, where
  // swapcontext makes a system call for the signal mask.
  __attribute__((naked, noinline)) static void exchange_stacks(void** /*from*/, void* /*to*/) {
    asm("pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
        "movq %rsp, (%rdi)\n\tmovq %rsi, %rsp\n\t"
        "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\tret");
  }
  void* pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
#if defined(WSSS_EMULATOR_ASAN)
  const char* bottom() const { return stack_ ? stack_ : own_bottom_; }
  void find_own_stack() {
    pthread_attr_t attributes;
    void* bottom = nullptr;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &bottom, &size_);
    pthread_attr_destroy(&attributes);
    own_bottom_ = static_cast<char*>(bottom);
  }
  void* fake_stack_ = nullptr;
  char* own_bottom_ = nullptr;
#endif
  char* stack_ = nullptr;
  size_t size_ = 0;
};

// A line of the kernel's source, where a thread waits.
struct Site {
  const char* file = "";
  int line = 0;
  bool operator!=(const Site& other) const { return line != other.line || std::strcmp(file, other.file) != 0; }
};

enum class Collective : uint8_t {
  sync,
  shuffle,
  ballot,
  match,
  add,
  min_signed,
  max_signed,
  min_unsigned,
  max_unsigned,
  bit_and,
  bit_or,
  bit_xor
};
enum class State : uint8_t { ready, at_barrier, at_collective, done };

struct AsyncCopy {
  void* target;
  int bytes, group;
  char value[16];
};

struct Thread {
  uint3 index;
  State state;
  Collective collective;
  unsigned mask;    // the lanes that this one's collective names
  int argument;     // the lane that a shuffle reads
  uint64_t value;   // what this lane brings to a collective, or the predicate of a barrier
  uint64_t result;  // what it takes away
  Site site;
  Fiber* fiber;
  int groups;  // asynchronous copies: committed groups, and the copies that have not arrived
  std::vector<AsyncCopy> copies;
};

struct Warp {
  unsigned live, waiting;
};

constexpr int kMaxThreads = 1024, kWarp = 32;
constexpr size_t kMaxShared = 227 << 10, kMaxStaticShared = 48 << 10;
constexpr int kMultiprocessors = 4;
#if defined(WSSS_EMULATOR_ASAN)
constexpr size_t kStack = 256 << 10;
#else
constexpr size_t kStack = 64 << 10;
#endif

// The shared memory of the running block, handed out array by array, each with a fence behind it.
class SharedMemory {
 public:
  void begin_launch(size_t dynamic_bytes) {
    if (!memory_) memory_.reset(new (std::align_val_t(kAlign)) char[kBytes]);
    open();
    dynamic_bytes_ = dynamic_bytes;
    static_bytes_ = 0;
    arrays_.clear();
    used_ = 0;
    reserve(dynamic_bytes);
  }
  void begin_block() {
    open();
    std::memset(memory_.get(), 0xff, used_);
    fence();
  }
  void end_launch() { open(); }
  void* dynamic() { return memory_.get(); }

  // The array that belongs to key, a variable of the kernel's own; the first thread that comes by reserves it.
  void* array(const void* key, size_t bytes) {
    for (const Array& a : arrays_)
      if (a.key == key) return memory_.get() + a.begin;
    static_bytes_ += bytes;
    WSSS_CHECK(static_bytes_ <= kMaxStaticShared && static_bytes_ + dynamic_bytes_ <= kMaxShared,
               "emulator: a kernel uses ", static_bytes_, " bytes of static and ", dynamic_bytes_,
               " of dynamic shared memory; at most ", kMaxStaticShared, " static and ", kMaxShared,
               " together are possible");
    open();
    const size_t begin = used_;
    reserve(bytes);
    std::memset(memory_.get() + begin, 0xff, used_ - begin);
    arrays_.push_back({key, begin, bytes});
    fence();
    return memory_.get() + begin;
  }

 private:
  struct Array {
    const void* key;
    size_t begin, bytes;
  };
  struct Release {
    void operator()(char* p) const { ::operator delete[](p, std::align_val_t(kAlign)); }
  };
  static constexpr size_t kAlign = 128, kBytes = 2 * kMaxShared + (64 << 10);

  void reserve(size_t bytes) {
    used_ += (bytes + kAlign - 1) / kAlign * kAlign + kAlign;
    WSSS_CHECK(used_ <= kBytes, "emulator: too many shared arrays");
  }
  void open() {
#if defined(WSSS_EMULATOR_ASAN)
    __asan_unpoison_memory_region(memory_.get(), kBytes);
#endif
  }
  void fence() {
#if defined(WSSS_EMULATOR_ASAN)
    size_t at = 0, bytes = dynamic_bytes_;
    for (size_t i = 0; i <= arrays_.size(); ++i) {
      const size_t next = i < arrays_.size() ? arrays_[i].begin : kBytes;
      __asan_poison_memory_region(memory_.get() + at + bytes, next - at - bytes);
      if (i < arrays_.size()) at = next, bytes = arrays_[i].bytes;
    }
#endif
  }

  std::unique_ptr<char[], Release> memory_;
  std::vector<Array> arrays_;
  size_t used_ = 0, dynamic_bytes_ = 0, static_bytes_ = 0;
};

}  // namespace wsss::emulator

// CUDA's built-in variables, those of the thread that runs.
inline uint3 threadIdx{}, blockIdx{};
inline dim3 blockDim, gridDim;

#include "wsss/cuda_emulator_machine.h"
