// The emulator's multiprocessor: runs the blocks of a launch, switches between threads, resolves barriers and
// collectives. Part of cuda_emulator.h.
#pragma once

namespace wsss::emulator {

class Machine;
inline Machine& machine();

class Machine {
 public:
  SharedMemory shared;

  void launch(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* argument) {
    // __shared__ variables are static, so one launch at a time; the autograd engine may have several threads.
    std::lock_guard<std::mutex> lock(mutex_);
    check_configuration(grid, block, shared_bytes);
    read_order();
    body_ = body;
    argument_ = argument;
    gridDim = grid;
    blockDim = block;
    count_ = int(block.x * block.y * block.z);
    prepare_threads();
    shared.begin_launch(shared_bytes);
    try {
      run_grid();
    } catch (...) {
      // Stacks of threads that stopped half-way are of no further use.
      idle_.clear();
      fibers_.clear();
      shared.end_launch();
      throw;
    }
    shared.end_launch();
  }

  Thread& thread() { return *current_; }
  int lane() const { return int(current_ - threads_.data()) % kWarp; }

  // Waits for the whole block; the number of threads whose predicate is not 0.
  int barrier(bool predicate, Site site) {
    Thread& t = *current_;
    t.site = site;
    t.value = predicate;
    wait(t, State::at_barrier);
    return int(t.result);
  }

  // Waits for the lanes of mask, then takes what the collective gives this lane.
  uint64_t collective(Collective kind, unsigned mask, uint64_t value, int argument, Site site) {
    Thread& t = *current_;
    const int me = int(&t - threads_.data());
    const unsigned bit = 1u << me % kWarp;
    t.site = site;
    t.mask = mask;
    t.collective = kind;
    t.value = value;
    t.argument = argument;
    if (!(mask & bit)) fail("emulator: ", describe(t), " is not in the mask that it names at ", describe(site));
    Warp& warp = warps_[size_t(me / kWarp)];
    warp.waiting |= bit;
    if ((mask & warp.live & ~warp.waiting) == 0)
      complete(me / kWarp, mask & warp.live, &t);
    else
      wait(t, State::at_collective);
    return t.result;
  }

  // In a random order any thread may be overtaken before an atomic.
  void at_atomic() {
    if (!random_ || (next_random() & 3) != 0) return;
    Thread& t = *current_;
    push(t);
    t.fiber = running_;
    hand_over();
  }

 private:
  static void check_configuration(dim3 grid, dim3 block, size_t shared_bytes) {
    const auto between = [](unsigned n, unsigned most) { return n >= 1 && n <= most; };
    WSSS_CHECK(between(grid.x, 0x7fffffffu) && between(grid.y, 65535) && between(grid.z, 65535),
               "emulator: impossible grid (", grid.x, ", ", grid.y, ", ", grid.z, ")");
    WSSS_CHECK(between(block.x, kMaxThreads) && between(block.y, kMaxThreads) && between(block.z, 64) &&
                   uint64_t(block.x) * block.y * block.z <= kMaxThreads,
               "emulator: impossible block (", block.x, ", ", block.y, ", ", block.z, ")");
    WSSS_CHECK(shared_bytes <= kMaxShared, "emulator: ", shared_bytes, " bytes of dynamic shared memory; at most ",
               kMaxShared, " are possible");
  }

  void read_order() {
    const char* order = std::getenv("WSSS_EMULATOR_ORDER");
    const std::string wish = order && *order ? order : "forward";
    reverse_ = wish == "reverse";
    random_ = wish.find_first_not_of("0123456789") == std::string::npos;
    WSSS_CHECK(reverse_ || random_ || wish == "forward",
               "WSSS_EMULATOR_ORDER must be forward, reverse or a number, got ", wish);
    if (random_) seed_ = (std::strtoull(wish.c_str(), nullptr, 10) + 1) * 0x9e3779b97f4a7c15u;
  }

  uint64_t next_random() {  // xorshift64
    seed_ ^= seed_ << 13;
    seed_ ^= seed_ >> 7;
    return seed_ ^= seed_ << 17;
  }

  void arrange(std::vector<unsigned>& items, unsigned count) {
    items.resize(count);
    for (unsigned i = 0; i < count; ++i) items[i] = reverse_ ? count - 1 - i : i;
    if (random_)
      for (unsigned i = count; i > 1; --i) std::swap(items[i - 1], items[next_random() % i]);
  }

  void prepare_threads() {
    threads_.resize(size_t(count_));
    warps_.resize(size_t((count_ + kWarp - 1) / kWarp));
    for (int i = 0; i < count_; ++i) {
      const unsigned n = unsigned(i);
      threads_[size_t(i)].index = {n % blockDim.x, n / blockDim.x % blockDim.y, n / (blockDim.x * blockDim.y)};
    }
  }

  void run_grid() {
    std::vector<unsigned> blocks;
    arrange(order_, unsigned(count_));
    arrange(blocks, unsigned(uint64_t(gridDim.x) * gridDim.y * gridDim.z));
    for (const unsigned b : blocks) {
      blockIdx = {b % gridDim.x, b / gridDim.x % gridDim.y, b / gridDim.x / gridDim.y};
      if (random_) arrange(order_, unsigned(count_));
      run_block();
    }
  }

  void run_block() {
    shared.begin_block();
    for (Thread& t : threads_) {
      t.state = State::ready;
      t.groups = 0;
      t.copies.clear();
    }
    for (size_t w = 0; w < warps_.size(); ++w) {
      const int lanes = std::min(kWarp, count_ - int(w) * kWarp);
      warps_[w] = {lanes == kWarp ? ~0u : (1u << lanes) - 1, 0};
    }
    next_ = done_ = 0;
    head_ = tail_ = 0;
    error_ = nullptr;
    for (;;) {
      running_ = &main_;
      hand_over();  // comes back when no thread can go on
      if (error_) std::rethrow_exception(error_);
      if (done_ == count_) return;
      release_barrier();
    }
  }

  // The body of every fiber: runs threads that have not begun yet, then lends its stack to nobody until the next block.
  static void work() {
    Fiber::arrived();
    Machine& m = machine();
    for (;;) {
      try {
        while (m.next_ < m.count_ && !m.error_) m.run_next();
      } catch (...) {
        m.error_ = std::current_exception();
      }
      if (!m.error_) m.idle_.push_back(m.running_);
      m.hand_over();
    }
  }

  void run_next() {
    Thread& t = threads_[order_[size_t(next_++)]];
    enter(t);
    body_(argument_);
    t.state = State::done;
    ++done_;
    const int me = int(&t - threads_.data());
    Warp& warp = warps_[size_t(me / kWarp)];
    warp.live &= ~(1u << me % kWarp);
    if (warp.waiting) settle(me / kWarp);
  }

  void enter(Thread& t) {
    current_ = &t;
    threadIdx = t.index;
  }

  void wait(Thread& t, State state) {
    t.state = state;
    t.fiber = running_;
    hand_over();
  }

  // Gives the processor to whoever can use it; returns when this fiber has it again.
  void hand_over() {
    Fiber* const from = running_;
    running_ = error_ ? &main_ : next_runnable();
    if (running_ != from) Fiber::switch_over(*from, *running_);
  }

  Fiber* next_runnable() {
    if (next_ < count_) {
      if (idle_.empty()) {
        fibers_.push_back(std::make_unique<Fiber>(kStack, &Machine::work));
        return fibers_.back().get();
      }
      Fiber* const fiber = idle_.back();
      idle_.pop_back();
      return fiber;
    }
    if (head_ == tail_) return &main_;
    Thread& t = *queue_[head_++ % kMaxThreads];
    enter(t);
    return t.fiber;
  }

  void push(Thread& t) {
    t.state = State::ready;
    queue_[tail_++ % kMaxThreads] = &t;
  }

  void release_barrier() {
    const Thread* first = nullptr;
    uint64_t votes = 0;
    for (const Thread& t : threads_) {
      if (t.state == State::at_collective)
        fail("emulator: ", describe(t), " waits at ", describe(t.site), " for lanes of its warp that never come");
      if (t.state != State::at_barrier) continue;
      if (!first) first = &t;
      if (first->site != t.site)
        fail("emulator: divergent barrier: ", describe(*first), " waits at ", describe(first->site), ", ", describe(t),
             " at ", describe(t.site));
      votes += t.value;
    }
    if (done_ > 0)
      fail("emulator: ", describe(*first), " waits at the barrier of ", describe(first->site), ", but ", done_, " of ",
           count_, " threads have returned");
    if (random_) arrange(order_, unsigned(count_));
    for (const unsigned i : order_) {
      threads_[i].result = votes;
      push(threads_[i]);
    }
  }

  // A lane has returned: collectives that waited only for it can complete.
  void settle(int w) {
    Warp& warp = warps_[size_t(w)];
    for (int i = 0; i < kWarp; ++i) {
      if (!(warp.waiting >> i & 1)) continue;
      const unsigned mask = threads_[size_t(w * kWarp + i)].mask;
      if ((mask & warp.live & ~warp.waiting) == 0) complete(w, mask & warp.live, nullptr);
    }
  }

  void complete(int w, unsigned lanes, const Thread* last) {
    Thread* const warp = threads_.data() + w * kWarp;
    const Thread& first = warp[__builtin_ctz(lanes)];
    for (int i = 0; i < kWarp; ++i) {
      if (!(lanes >> i & 1)) continue;
      const Thread& t = warp[i];
      if (t.site != first.site || t.collective != first.collective)
        fail("emulator: divergent warp: ", describe(first), " is at ", describe(first.site), ", ", describe(t), " at ",
             describe(t.site));
      if (t.mask != first.mask)
        fail("emulator: ", describe(first), " and ", describe(t), " name different masks at ", describe(t.site));
    }
    for (int i = 0; i < kWarp; ++i)
      if (lanes >> i & 1) warp[i].result = result_of(warp, lanes, i);
    warps_[size_t(w)].waiting &= ~lanes;
    const int turn = random_ ? int(next_random() % kWarp) : 0;
    for (int i = 0; i < kWarp; ++i) {
      const int lane = reverse_ ? kWarp - 1 - i : (i + turn) % kWarp;
      if ((lanes >> lane & 1) && &warp[lane] != last) push(warp[lane]);
    }
  }

  static uint64_t result_of(const Thread* warp, unsigned lanes, int lane) {
    const Thread& me = warp[lane];
    const auto each = [&](auto start, auto join) {
      for (int i = 0; i < kWarp; ++i)
        if (lanes >> i & 1) start = join(start, decltype(start)(warp[i].value));
      return uint64_t(uint32_t(start));
    };
    switch (me.collective) {
      case Collective::sync: return 0;
      case Collective::shuffle: return (lanes >> me.argument & 1) ? warp[me.argument].value : ~uint64_t(0);
      case Collective::ballot:
      case Collective::match: {
        const uint64_t wanted = me.collective == Collective::ballot ? 1 : me.value;
        unsigned found = 0;
        for (int i = 0; i < kWarp; ++i)
          if ((lanes >> i & 1) && warp[i].value == wanted) found |= 1u << i;
        return found;
      }
      case Collective::add: return each(0u, [](unsigned a, unsigned b) { return a + b; });
      case Collective::min_signed: return each(INT32_MAX, [](int a, int b) { return std::min(a, b); });
      case Collective::max_signed: return each(INT32_MIN, [](int a, int b) { return std::max(a, b); });
      case Collective::min_unsigned: return each(~0u, [](unsigned a, unsigned b) { return std::min(a, b); });
      case Collective::max_unsigned: return each(0u, [](unsigned a, unsigned b) { return std::max(a, b); });
      case Collective::bit_and: return each(~0u, [](unsigned a, unsigned b) { return a & b; });
      case Collective::bit_or: return each(0u, [](unsigned a, unsigned b) { return a | b; });
      case Collective::bit_xor: return each(0u, [](unsigned a, unsigned b) { return a ^ b; });
    }
    return 0;
  }

  static std::string describe(const Site& site) { return std::string(site.file) + ":" + std::to_string(site.line); }
  static std::string describe(const Thread& t) {
    const auto text = [](uint3 i) {
      return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
    };
    return "thread " + text(t.index) + " of block " + text(blockIdx);
  }

  std::mutex mutex_;
  void (*body_)(void*) = nullptr;
  void* argument_ = nullptr;
  bool reverse_ = false, random_ = false;
  uint64_t seed_ = 1;
  int count_ = 0, next_ = 0, done_ = 0;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<unsigned> order_;
  Thread* queue_[kMaxThreads] = {};
  unsigned head_ = 0, tail_ = 0;
  Thread* current_ = nullptr;
  Fiber main_;
  Fiber* running_ = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> idle_;
  std::exception_ptr error_;
};

inline Machine& machine() {
  // Never destroyed: a library that is unloaded at exit must not outlive its stacks.
  static Machine* const m = new Machine;
  return *m;
}

}  // namespace wsss::emulator
