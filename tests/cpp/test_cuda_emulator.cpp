// The CUDA emulator itself: what CUDA defines comes out right, and every planted defect that it promises to find is
// found. It runs each check in several thread orders; WSSS_EMULATOR_ORDER adds the one that the caller asks for.
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <string>
#include <vector>

#include "wsss/cuda.h"

#if defined(WSSS_EMULATOR_ASAN)
#include <sys/wait.h>
#include <unistd.h>
#endif

namespace {

using wsss::launch;

int checks = 0, failures = 0;

void expect(bool ok, const std::string& what) {
  ++checks;
  if (ok) return;
  ++failures;
  const char* order = std::getenv("WSSS_EMULATOR_ORDER");
  std::printf("FAILED: %s (order %s)\n", what.c_str(), order ? order : "forward");
}

void expect_error(const std::string& text, const std::function<void()>& action) {
  std::string message = "nothing was reported";
  try {
    action();
  } catch (const std::exception& error) {
    message = error.what();
  }
  expect(message.find(text) != std::string::npos, "an error with '" + text + "', got: " + message);
}

// Runs body in the caller's order, both plain orders and some random ones; the number of orders in which it was true.
int in_every_order(const std::function<bool()>& body, int* orders) {
  const char* now = std::getenv("WSSS_EMULATOR_ORDER");
  const std::string before = now ? now : "forward";
  std::vector<std::string> wanted{before, "forward", "reverse", "1", "2", "3", "4"};
  int held = 0;
  for (const std::string& order : wanted) {
    setenv("WSSS_EMULATOR_ORDER", order.c_str(), 1);
    held += body();
  }
  setenv("WSSS_EMULATOR_ORDER", before.c_str(), 1);
  *orders = int(wanted.size());
  return held;
}

void expect_always(const std::string& what, const std::function<bool()>& body) {
  int orders = 0;
  const int held = in_every_order(body, &orders);
  expect(held == orders, what + ": right in " + std::to_string(held) + " of " + std::to_string(orders) + " orders");
}

void expect_found(const std::string& what, const std::function<bool()>& right) {
  int orders = 0;
  const int held = in_every_order(right, &orders);
  expect(held < orders, what + ": a planted defect was found in no order");
}

// Sums, through shared memory and then shuffles.
__global__ void block_sum(const float* x, float* sums, int n) {
  WSSS_SHARED(float, part, [32]);
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x), lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  float v = i < n ? x[i] : 0.f;
  for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(~0u, v, d);
  if (lane == 0) part[warp] = v;
  __syncthreads();
  if (warp == 0) {
    v = lane < int(blockDim.x) / 32 ? part[lane] : 0.f;
    for (int d = 16; d > 0; d /= 2) v += __shfl_down_sync(~0u, v, d);
    if (lane == 0) sums[blockIdx.x] = v;
  }
}

void test_reduction() {
  std::vector<float> x(1000), sums(4);
  std::iota(x.begin(), x.end(), 1.f);
  expect_always("block sum", [&] {
    launch(block_sum, dim3(4), dim3(256), 0, nullptr, x.data(), sums.data(), 1000);
    return sums[0] + sums[1] + sums[2] + sums[3] == 500500.f && sums[3] == 205204.f;
  });
}

__global__ void reverse_rows(const int* in, int* out, bool barrier) {
  WSSS_DYNAMIC_SHARED(int, row);
  const int i = int(threadIdx.x), n = int(blockDim.x), base = int(blockIdx.y * gridDim.x + blockIdx.x) * n;
  row[i] = in[base + i];
  if (barrier) __syncthreads();
  out[base + i] = row[n - 1 - i];
}

void test_dynamic_shared(bool barrier) {
  std::vector<int> in(2 * 3 * 77), out(in.size());
  std::iota(in.begin(), in.end(), 0);
  const auto right = [&] {
    launch(reverse_rows, dim3(2, 3), dim3(77), 77 * sizeof(int), nullptr, in.data(), out.data(), barrier);
    bool same = true;
    for (size_t i = 0; i < in.size(); ++i) same = same && out[i] == int(i / 77 * 77 + 76 - i % 77);
    return same;
  };
  if (barrier)
    expect_always("dynamic shared memory", right);
  else
    expect_found("a missing __syncthreads", right);
}

__global__ void plain_shared(int* out, bool barrier) {
  __shared__ int cell[64];
  const int i = int(threadIdx.x);
  cell[i] = 100 * int(blockIdx.x) + i;
  if (barrier) __syncthreads();
  out[64 * blockIdx.x + threadIdx.x] = cell[63 - i];
}

void test_plain_shared() {
  std::vector<int> out(128);
  const auto run = [&](bool barrier) {
    launch(plain_shared, dim3(2), dim3(64), 0, nullptr, out.data(), barrier);
    bool same = true;
    for (int i = 0; i < 128; ++i) same = same && out[size_t(i)] == 100 * (i / 64) + 63 - i % 64;
    return same;
  };
  expect_always("__shared__", [&] { return run(true); });
  expect_found("a missing __syncthreads at __shared__", [&] { return run(false); });
}

__global__ void neighbour_in_warp(int* out, bool barrier) {
  WSSS_SHARED(int, cell, [32]);
  const int i = int(threadIdx.x);
  cell[i] = i;
  if (barrier) __syncwarp();
  out[i] = cell[(i + 1) % 32];
  if (barrier) __syncwarp();
  cell[i] = -1;
}

void test_syncwarp() {
  std::vector<int> out(32);
  const auto run = [&](bool barrier) {
    launch(neighbour_in_warp, dim3(1), dim3(32), 0, nullptr, out.data(), barrier);
    bool same = true;
    for (int i = 0; i < 32; ++i) same = same && out[size_t(i)] == (i + 1) % 32;
    return same;
  };
  expect_always("__syncwarp", [&] { return run(true); });
  expect_found("a missing __syncwarp", [&] { return run(false); });
}

struct Warp {
  unsigned ballot, match, low_ballot;
  int any, all, sum, smallest, count, either, both;
  unsigned largest, bits;
  int from, up, down, across, segment_up, segment_from;
  double wide;
};

__global__ void collectives(Warp* out) {
  const int lane = int(threadIdx.x % 32);
  Warp w{};
  w.ballot = __ballot_sync(~0u, lane % 3 == 0);
  w.match = __match_any_sync(~0u, lane / 5);
  if (lane < 16) w.low_ballot = __ballot_sync(0xffffu, lane & 1);
  w.any = __any_sync(~0u, lane == 40);
  w.all = __all_sync(~0u, lane < 32);
  w.sum = __reduce_add_sync(~0u, lane);
  w.smallest = __reduce_min_sync(~0u, lane - 7);
  w.largest = __reduce_max_sync(~0u, unsigned(lane) - 7u);
  w.bits = __reduce_xor_sync(~0u, 1u << lane) ^ __reduce_or_sync(~0u, 1u << lane) ^
           __reduce_and_sync(~0u, 8u | unsigned(lane));
  w.count = __syncthreads_count(lane < 3);
  w.either = __syncthreads_or(threadIdx.x == 50);
  w.both = __syncthreads_and(threadIdx.x != 50);
  w.from = __shfl_sync(~0u, lane, 7);
  w.up = __shfl_up_sync(~0u, lane, 2);
  w.down = __shfl_down_sync(~0u, lane, 2);
  w.across = __shfl_xor_sync(~0u, lane, 5);
  w.segment_up = __shfl_up_sync(~0u, lane, 3, 8);
  w.segment_from = __shfl_sync(~0u, lane, 1, 8);
  w.wide = __shfl_sync(~0u, 1. / (1 + lane), 9);
  out[threadIdx.x] = w;
}

bool right(const Warp& w, int lane) {
  const unsigned fives = lane / 5 == 6 ? 0xc0000000u : 0x1fu << (lane / 5 * 5);
  return w.ballot == 0x49249249u && w.match == fives && w.low_ballot == (lane < 16 ? 0xaaaau : 0u) && !w.any && w.all &&
         w.sum == 496 && w.smallest == -7 && w.largest == ~0u && w.bits == 8u && w.count == 6 && w.either && !w.both &&
         w.from == 7 && w.up == (lane < 2 ? lane : lane - 2) && w.down == (lane > 29 ? lane : lane + 2) &&
         w.across == (lane ^ 5) && w.segment_up == (lane % 8 < 3 ? lane : lane - 3) &&
         w.segment_from == lane / 8 * 8 + 1 && w.wide == .1;
}

void test_collectives() {
  std::vector<Warp> out(64);
  expect_always("warp collectives", [&] {
    launch(collectives, dim3(1), dim3(64), 0, nullptr, out.data());
    bool all = true;
    for (int i = 0; i < 64; ++i) all = all && right(out[size_t(i)], i % 32);
    return all;
  });
}

__global__ void partial_warp(float* out, int returned_from) {
  const int i = int(threadIdx.x);
  if (i >= returned_from) return;  // lanes that have returned are exempt
  out[i] = __shfl_down_sync(~0u, float(i), 1);
}

void test_partial_warp() {
  std::vector<float> out(20);
  for (const int returned_from : {20, 11})
    expect_always("a warp of which lanes are missing", [&] {
      launch(partial_warp, dim3(1), dim3(20), 0, nullptr, out.data(), returned_from);
      const float last = out[size_t(returned_from - 1)];
      return out[0] == 1.f && out[9] == 10.f && last != last;
    });
}

__global__ void histogram(const int* values, int* counts, unsigned long long* smallest, int n) {
  WSSS_SHARED(int, local, [8]);
  if (threadIdx.x < 8) local[threadIdx.x] = 0;
  __syncthreads();
  for (int i = int(blockIdx.x * blockDim.x + threadIdx.x); i < n; i += int(gridDim.x * blockDim.x)) {
    atomicAdd(&local[values[i]], 1);
    atomicMin(smallest, values[i] + 3);
  }
  __syncthreads();
  if (threadIdx.x < 8) atomicAdd(&counts[threadIdx.x], local[threadIdx.x]);
}

__global__ void increment_carelessly(int* count, bool atomic) {
  if (atomic) {
    int old = *count, seen;
    do {
      seen = old;
      old = atomicCAS(count, seen, seen + 1);
    } while (old != seen);
  } else {
    const int old = atomicAdd(count, 0);
    atomicExch(count, old + 1);
  }
}

void test_atomics() {
  std::vector<int> values(500);
  for (size_t i = 0; i < values.size(); ++i) values[i] = int(i * i % 8);
  expect_always("atomics", [&] {
    std::vector<int> counts(8);
    unsigned long long smallest = ~0ull;
    launch(histogram, dim3(3), dim3(96), 0, nullptr, values.data(), counts.data(), &smallest, 500);
    return counts[0] == 125 && counts[1] == 250 && counts[4] == 125 && counts[5] == 0 && smallest == 3;
  });
  const auto count = [](bool atomic) {
    int n = 0;
    launch(increment_carelessly, dim3(2), dim3(50), 0, nullptr, &n, atomic);
    return n == 100;
  };
  expect_always("a loop around atomicCAS", [&] { return count(true); });
  expect_found("an update that is not atomic", [&] { return count(false); });
}

__global__ void copy_through_shared(const float* in, float* out, int n, bool wait) {
  WSSS_SHARED(float, tile, [2][64]);
  const int i = int(threadIdx.x);
  wsss::copy_async<4>(&tile[0][i], in + i, i < n);
  wsss::copy_async_commit();
  wsss::copy_async<4>(&tile[1][i], in + 64 + i, 64 + i < n);
  wsss::copy_async_commit();
  if (wait) wsss::copy_async_wait<1>();
  __syncthreads();
  out[i] = tile[0][63 - i];
  wsss::copy_async_wait<0>();
  __syncthreads();
  out[64 + i] = tile[1][63 - i];
}

void test_copy_async() {
  std::vector<float> in(100, 2.f), out(128);
  const auto run = [&](bool wait) {
    launch(copy_through_shared, dim3(1), dim3(64), 0, nullptr, in.data(), out.data(), 100, wait);
    bool same = true;
    for (int i = 0; i < 128; ++i) same = same && out[size_t(i)] == (i < 64 || 127 - i < 36 ? 2.f : 0.f);
    return same;
  };
  expect_always("asynchronous copies", [&] { return run(true); });
  expect_found("a missing copy_async_wait", [&] { return run(false); });
}

__global__ void divergent(bool) {
  if (threadIdx.x < 7)
    __syncthreads();
  else
    __syncthreads();
}
__global__ void early_exit(bool) {
  if (threadIdx.x == 3) return;
  __syncthreads();
}
__global__ void divergent_warp(bool) {
  if (threadIdx.x % 2)
    __syncwarp();
  else
    __syncwarp();
}
__global__ void lost_lane(bool) {
  if (threadIdx.x == 9)
    __syncthreads();
  else
    __shfl_sync(~0u, 1, 0);
  __syncthreads();
}
__global__ void stranger(bool) { (void)__ballot_sync(~1u, 1); }
__global__ void two_masks(bool) { (void)__ballot_sync(threadIdx.x < 16 ? ~0u : ~1u, 1); }
__global__ void too_much_shared(bool) {
  WSSS_SHARED(char, block, [50000]);
  block[0] = 0;
}
__global__ void misaligned(char* at) {
  WSSS_SHARED(char, buffer, [32]);
  wsss::copy_async<4>(buffer + 2, at);
}
__global__ void nothing(bool) {}

void test_defects() {
  const auto run = [](void (*kernel)(bool), int threads) {
    return [=] { launch(kernel, dim3(2), dim3(unsigned(threads)), 0, nullptr, true); };
  };
  char bytes[8] = {};
  int orders = 0;
  in_every_order(
      [&] {
        expect_error("divergent barrier", run(divergent, 64));
        expect_error("waits at the barrier of", run(early_exit, 64));
        expect_error("divergent warp", run(divergent_warp, 64));
        expect_error("for lanes of its warp that never come", run(lost_lane, 64));
        expect_error("is not in the mask", run(stranger, 32));
        expect_error("different masks", run(two_masks, 32));
        expect_error("bytes of static", run(too_much_shared, 32));
        expect_error("not a multiple", [&] { launch(misaligned, dim3(1), dim3(1), 0, nullptr, bytes); });
        launch(nothing, dim3(1), dim3(1024), 0, nullptr, true);  // a launch after an error is as good as new
        return true;
      },
      &orders);
  expect_error("impossible block", run(nothing, 1025));
  expect_error("impossible block", run(nothing, 0));
  expect_error("impossible grid", [] { launch(nothing, dim3(1, 70000), dim3(1), 0, nullptr, true); });
  expect_error("impossible grid", [] { launch(nothing, dim3(0), dim3(1), 0, nullptr, true); });
  expect_error("dynamic shared memory", [] { launch(nothing, dim3(1), dim3(1), 300000, nullptr, true); });
  const char* now = std::getenv("WSSS_EMULATOR_ORDER");
  const std::string before = now ? now : "forward";
  setenv("WSSS_EMULATOR_ORDER", "sideways", 1);
  expect_error("must be forward, reverse or a number", run(nothing, 1));
  setenv("WSSS_EMULATOR_ORDER", before.c_str(), 1);
}

__global__ void read_uninitialised(float* out) {
  WSSS_SHARED(float, cell, [4]);
  WSSS_DYNAMIC_SHARED(float, more);
  out[0] = cell[3];
  out[1] = more[2];
  cell[3] = more[2] = 1.f;
}

void test_poison() {
  std::vector<float> out(2);
  expect_always("uninitialised shared memory", [&] {
    out = {0.f, 0.f};
    launch(read_uninitialised, dim3(2), dim3(1), 16, nullptr, out.data());
    return out[0] != out[0] && out[1] != out[1];
  });
}

__global__ void indices(int* seen) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  if (thread % 2) __syncwarp(0xaaaaaaaau);
  atomicAdd(&seen[block * 30 + thread], 1);
}

void test_indices() {
  expect_always("built-in variables", [&] {
    std::vector<int> seen(24 * 30);
    launch(indices, dim3(2, 3, 4), dim3(5, 3, 2), 0, nullptr, seen.data());
    return std::all_of(seen.begin(), seen.end(), [](int n) { return n == 1; });
  });
}

void test_intrinsics() {
  expect(__clz(1) == 31 && __clz(0) == 32 && __clzll(1) == 63 && __clzll(0) == 64, "clz");
  expect(__ffs(8) == 4 && __ffs(0) == 0 && __ffsll(1ll << 40) == 41 && __ffsll(0) == 0, "ffs");
  expect(__popc(0xf0f0u) == 8 && __popcll(~0ull) == 64, "popc");
  expect(__brev(1u) == 0x80000000u && __brevll(1ull << 3) == 1ull << 60, "brev");
  expect(__funnelshift_l(0x80000000u, 1u, 1) == 3u && __funnelshift_r(0u, 1u, 1) == 0x80000000u, "funnel shifts");
  expect(__umulhi(0x80000000u, 6u) == 3u, "umulhi");
  expect(__float_as_uint(1.f) == 0x3f800000u && __int_as_float(0x40000000) == 2.f, "casts of bits");
  expect(__float2int_rn(2.5f) == 2 && __float2int_rd(-.5f) == -1 && __float2int_ru(.1f) == 1, "rounding");
  expect(wsss::half2_floats(wsss::half2_bits(1.5f, -2.f)).x == 1.5f && wsss::half2_bits(65504.f, 1e-8f) == 0x7bffu,
         "half");
  expect(__saturatef(3.f) == 1.f && rsqrtf(4.f) == .5f && __expf(0.f) == 1.f, "fast functions");
}

#if defined(WSSS_EMULATOR_ASAN)
__global__ void write_at(float* global, int where, int what) {
  WSSS_SHARED(float, first, [10]);
  WSSS_SHARED(float, second, [10]);
  WSSS_DYNAMIC_SHARED(float, dynamic);
  float* const target[] = {global, first, second, dynamic};
  __syncthreads();
  target[what][where + int(threadIdx.x)] = 1.f;
}

// Whether a child process that runs this is stopped by AddressSanitizer.
bool dies(int where, int what) {
  const pid_t child = fork();
  if (child == 0) {
    if (!std::freopen("/dev/null", "w", stderr)) _exit(2);
    std::vector<float> global(12);
    launch(write_at, dim3(1), dim3(2), 10 * sizeof(float), nullptr, global.data(), where, what);
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return !(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

void test_sanitizer() {
  const char* name[] = {"global", "static shared", "second static shared", "dynamic shared"};
  for (int what = 0; what < 4; ++what) {
    expect(!dies(8, what), std::string("the last elements of a ") + name[what] + " array are in bounds");
    expect(dies(what ? 9 : 11, what), std::string("one past a ") + name[what] + " array is reported");
  }
}
#endif

}  // namespace

int main() {
  test_reduction();
  test_dynamic_shared(true);
  test_dynamic_shared(false);
  test_plain_shared();
  test_syncwarp();
  test_collectives();
  test_partial_warp();
  test_atomics();
  test_copy_async();
  test_defects();
  test_poison();
  test_indices();
  test_intrinsics();
#if defined(WSSS_EMULATOR_ASAN)
  test_sanitizer();
#endif
  std::printf("CUDA emulator: %d checks, %d failed\n", checks, failures);
  return failures != 0;
}
