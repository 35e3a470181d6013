// Runs CUDA kernels on the CPU, for tests: a file defines PLUM_CUDA_ON_CPU, then includes a .cu.
//
// Blocks run one after another, the threads of a block as fibers that take turns, in a random
// order that differs from block to block. A thread gives way only where it waits for others: at a
// barrier, a shuffle, a vote or a product of tensor cores. All threads of the block, or of the
// warp, must come to the same line; where they do not, the process says so and ends. Shared memory
// is NaN at first, and of the copies to it some land at once, some when they are waited for. Of
// what CUDA has, there is what csrc/cuda uses.
#pragma once

#include <stdint.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda_types.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define PLUM_SWITCH_FROM(fake, stack, size) __sanitizer_start_switch_fiber(fake, stack, size)
#define PLUM_SWITCHED_TO(fake, stack, size) __sanitizer_finish_switch_fiber(fake, stack, size)
#else
#define PLUM_SWITCH_FROM(fake, stack, size) static_cast<void>(stack), static_cast<void>(size)
#define PLUM_SWITCHED_TO(fake, stack, size) static_cast<void>(stack), static_cast<void>(size)
#endif

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
// One block runs at a time.
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace cuda_on_cpu {

constexpr size_t kStackBytes = size_t{1} << 17;
constexpr int kWarp = 32;

// Threads that meet: a block or a warp.
struct Group {
  int first = 0, size = 0;
  std::vector<void*> slots;
  int arrived = 0;
  const char* what = nullptr;
  int line = 0;
};

struct AsyncCopy {
  void* to;
  const void* from;
};

struct Fiber {
  ucontext_t context;  // where it starts
  void* place[5];      // and goes on
  std::unique_ptr<char[]> stack;
  void* fake_stack = nullptr;
  bool started = false, done = false;
  std::deque<std::vector<AsyncCopy>> copies;
};

struct Device {
  dim3 grid, block_size, block;
  std::vector<Fiber> fibers;
  std::vector<int> ready;
  Group all;
  std::vector<Group> warps;
  int current = 0, done = 0;
  std::function<void()> kernel;
  // Called when no thread can go on, to make one that can.
  std::function<void()> idle = [] {};
  std::unique_ptr<char[]> shared_bytes;
  char* shared = nullptr;
  void* host[5];
  void* host_fake_stack = nullptr;
  const void* host_stack = nullptr;
  size_t host_stack_bytes = 0;
  std::mt19937 random{1};
};

inline Device& device() {
  static Device device;
  return device;
}

[[noreturn]] inline void fail(const char* message) {
  Device& d = device();
  std::fprintf(stderr, "CUDA on CPU: block %u %u, thread %d: %s\n", d.block.x, d.block.y, d.current,
               message);
  const auto report = [](const Group& group) {
    if (group.arrived == 0) return;
    std::fprintf(stderr, "  of threads %d to %d, %d wait at %s of line %d\n", group.first,
                 group.first + group.size - 1, group.arrived, group.what, group.line);
  };
  report(d.all);
  for (const Group& warp : d.warps) report(warp);
  // Past destructors, which would run on the stack of a fiber.
  std::_Exit(1);
}

// Jumps to where a thread starts or goes on. Unlike swapcontext this asks nothing of the system,
// and it leaves the sanitizer's notes on the stacks as they are.
[[noreturn]] __attribute__((noinline, no_sanitize("address"))) inline void go_on(Fiber& to) {
  if (to.started) __builtin_longjmp(to.place, 1);
  to.started = true;
  setcontext(&to.context);
  __builtin_unreachable();
}

[[noreturn]] __attribute__((noinline, no_sanitize("address"))) inline void return_to_host() {
  __builtin_longjmp(device().host, 1);
}

// Goes on with another thread; returns when this one's turn comes.
[[gnu::noinline]] inline void give_way() {
  Device& d = device();
  Fiber& from = d.fibers[d.current];
  if (d.ready.empty() && d.done < static_cast<int>(d.fibers.size())) d.idle();
  if (d.ready.empty() && d.done < static_cast<int>(d.fibers.size())) {
    fail("no thread can go on: some wait for threads that wait elsewhere or have ended");
  }
  const bool ended = d.ready.empty();
  if (!ended) {
    std::swap(d.ready[d.random() % d.ready.size()], d.ready.back());
    d.current = d.ready.back();
    d.ready.pop_back();
  }
  Fiber& to = d.fibers[d.current];
  if (&to == &from && !ended) return;
  // The last thread of a block goes back to the host.
  PLUM_SWITCH_FROM(from.done ? nullptr : &from.fake_stack, ended ? d.host_stack : to.stack.get(),
                   ended ? d.host_stack_bytes : kStackBytes);
  if (__builtin_setjmp(from.place) == 0) {
    if (ended) return_to_host();
    go_on(to);
  }
  PLUM_SWITCHED_TO(from.fake_stack, nullptr, nullptr);
}

inline void run_thread() {
  Device& d = device();
  // The first to run comes from the host.
  const bool first = d.host_stack == nullptr;
  PLUM_SWITCHED_TO(nullptr, first ? &d.host_stack : nullptr, first ? &d.host_stack_bytes : nullptr);
  d.kernel();
  for (const auto& group : d.fibers[d.current].copies) {
    if (!group.empty()) fail("ended with copies that it did not wait for");
  }
  d.fibers[d.current].done = true;
  ++d.done;
  give_way();
}

// What threads do together: the last to come does it for all, with what each of them brought.
template <typename Slot, typename Act>
void meet(Group& group, const char* what, int line, Slot* slot, Act act) {
  Device& d = device();
  if (group.arrived == 0) {
    group.what = what;
    group.line = line;
  } else if (group.what != what || group.line != line) {
    std::fprintf(stderr, "CUDA on CPU: %s of line %d, but\n", what, line);
    fail("others wait elsewhere");
  }
  const int here = d.current;
  group.slots[here - group.first] = slot;
  if (++group.arrived < group.size) {
    give_way();
    return;
  }
  act(reinterpret_cast<Slot**>(group.slots.data()));
  group.arrived = 0;
  for (int other = group.first; other < group.first + group.size; ++other) {
    if (other != here) d.ready.push_back(other);
  }
}

inline Group& warp() { return device().warps[device().current / kWarp]; }

inline Group& whole_warp(unsigned mask) {
  if (mask != 0xffffffffu || warp().size != kWarp) fail("not a whole warp");
  return warp();
}

[[gnu::noinline]] inline void run_block(size_t shared) {
  Device& d = device();
  const int threads = static_cast<int>(d.block_size.x * d.block_size.y * d.block_size.z);
  // To the byte, so that what lies beyond is found; never none.
  d.shared_bytes.reset(new char[shared + 16]);
  const auto address = reinterpret_cast<uintptr_t>(d.shared_bytes.get());
  d.shared = d.shared_bytes.get() + (16 - address % 16) % 16;
  std::memset(d.shared, 0xff, shared);
  const auto form = [](Group& group, int begin, int end) {
    group.first = begin;
    group.size = end - begin;
    group.slots.assign(group.size, nullptr);
    group.arrived = 0;
  };
  form(d.all, 0, threads);
  d.warps.resize((threads + kWarp - 1) / kWarp);
  for (size_t i = 0; i < d.warps.size(); ++i) {
    form(d.warps[i], static_cast<int>(i) * kWarp,
         std::min(threads, static_cast<int>(i + 1) * kWarp));
  }
  d.fibers.resize(threads);
  d.ready.resize(threads);
  std::iota(d.ready.begin(), d.ready.end(), 0);
  d.done = 0;
  for (Fiber& fiber : d.fibers) {
    if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
    fiber.started = fiber.done = false;
    fiber.copies.assign(1, {});
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber.context, run_thread, 0);
  }
  d.current = d.ready.back();
  d.ready.pop_back();
  Fiber& first = d.fibers[d.current];
  PLUM_SWITCH_FROM(&d.host_fake_stack, first.stack.get(), kStackBytes);
  if (__builtin_setjmp(d.host) == 0) go_on(first);
  PLUM_SWITCHED_TO(d.host_fake_stack, nullptr, nullptr);
}

// A thread's index, which is not stored but asked for.
struct ThreadIndex {
  struct X {
    operator unsigned() const { return device().current; }
  } x;
};

}  // namespace cuda_on_cpu

inline constexpr cuda_on_cpu::ThreadIndex threadIdx{};
#define blockIdx (cuda_on_cpu::device().block)
#define blockDim (cuda_on_cpu::device().block_size)
#define gridDim (cuda_on_cpu::device().grid)

// Barriers, votes and shuffles.

inline void __syncthreads(int line = __builtin_LINE()) {
  int none = 0;
  cuda_on_cpu::meet(cuda_on_cpu::device().all, "__syncthreads", line, &none, [](int**) {});
}

inline int __syncthreads_or(int value, int line = __builtin_LINE()) {
  const size_t size = cuda_on_cpu::device().fibers.size();
  cuda_on_cpu::meet(cuda_on_cpu::device().all, "__syncthreads_or", line, &value, [=](int** slots) {
    int any = 0;
    for (size_t i = 0; i < size; ++i) any |= *slots[i] != 0;
    for (size_t i = 0; i < size; ++i) *slots[i] = any;
  });
  return value;
}

inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
  int none = 0;
  cuda_on_cpu::meet(cuda_on_cpu::whole_warp(mask), "__syncwarp", line, &none, [](int**) {});
}

inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  unsigned slot = predicate != 0;
  cuda_on_cpu::meet(cuda_on_cpu::whole_warp(mask), "a vote", line, &slot, [](unsigned** slots) {
    unsigned votes = 0;
    for (int lane = 0; lane < cuda_on_cpu::kWarp; ++lane) votes |= *slots[lane] << lane;
    for (int lane = 0; lane < cuda_on_cpu::kWarp; ++lane) *slots[lane] = votes;
  });
  return slot;
}

inline int __all_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return __ballot_sync(mask, predicate, line) == mask;
}

inline int __any_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return __ballot_sync(mask, predicate, line) != 0;
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int line = __builtin_LINE()) {
  struct Slot {
    T value, found;
    int source;
  } slot{value, value, source};
  cuda_on_cpu::meet(cuda_on_cpu::whole_warp(mask), "a shuffle", line, &slot, [](Slot** slots) {
    for (int lane = 0; lane < cuda_on_cpu::kWarp; ++lane) {
      slots[lane]->found = slots[slots[lane]->source % cuda_on_cpu::kWarp]->value;
    }
  });
  return slot.found;
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int line = __builtin_LINE()) {
  return __shfl_sync(mask, value, (threadIdx.x % cuda_on_cpu::kWarp) ^ lanes, line);
}

// What common.cuh has for GPUs.

namespace plum::cuda {

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, cudaStream_t,
            Arguments... arguments) {
  auto& d = cuda_on_cpu::device();
  d.grid = grid;
  d.block_size = block;
  d.kernel = [=] { kernel(arguments...); };
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      d.block = dim3(x, y);
      cuda_on_cpu::run_block(shared);
    }
  }
}

template <typename T>
T* shared_memory() {
  return reinterpret_cast<T*>(cuda_on_cpu::device().shared);
}

inline void copy_async(void* shared, const void* global) {
  auto& d = cuda_on_cpu::device();
  // Some land at once, the others when they are waited for.
  if (d.random() % 2) {
    std::memcpy(shared, global, 16);
  } else {
    d.fibers[d.current].copies.back().push_back({shared, global});
  }
}

inline void end_group() {
  auto& d = cuda_on_cpu::device();
  d.fibers[d.current].copies.emplace_back();
}

template <int kLatest>
void wait_for_groups() {
  auto& d = cuda_on_cpu::device();
  auto& groups = d.fibers[d.current].copies;
  // The last is the one that has not ended.
  for (; groups.size() > kLatest + 1; groups.pop_front()) {
    for (const auto& copy : groups.front()) std::memcpy(copy.to, copy.from, 16);
  }
}

// sum += a b of fp16, [16, 16] and [16, 8], in the registers of mma.m16n8k16.
inline void multiply(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1,
                     int line = __builtin_LINE()) {
  struct Slot {
    float* sum;
    const unsigned* a;
    unsigned b[2];
  } slot{sum, a, {b0, b1}};
  cuda_on_cpu::meet(cuda_on_cpu::whole_warp(~0u), "multiply", line, &slot, [](Slot** slots) {
    const auto part = [](unsigned word, int i) {
      return __half2float({static_cast<uint16_t>(i ? word >> 16 : word)});
    };
    float left[16][16], right[8][16];
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 8; ++i) {
        const int k = lane % 4 * 2 + i % 2 + i / 4 * 8;
        left[lane / 4 + i / 2 % 2 * 8][k] = part(slots[lane]->a[i / 2], i % 2);
        if (i / 2 % 2 == 0) right[lane / 4][k] = part(slots[lane]->b[i / 4], i % 2);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        float terms[17];
        const float* x = left[lane / 4 + i / 2 * 8];
        const float* y = right[lane % 4 * 2 + i % 2];
        for (int k = 0; k < 16; ++k) terms[k] = x[k] * y[k];
        terms[16] = slots[lane]->sum[i];
        slots[lane]->sum[i] = sum_as_tensor_cores(terms, 17);
      }
    }
  });
}

}  // namespace plum::cuda
