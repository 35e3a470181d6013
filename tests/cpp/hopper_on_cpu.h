// What csrc/cuda/hopper.cuh has for GPUs, on the CPU: see cuda_on_cpu.h. Copies land when they are
// waited for, in a random order, and products are made when they are waited for, so that what is
// overwritten or read too early is found.
#pragma once

#include "cuda_on_cpu.h"

namespace cuda_on_cpu {

constexpr int kGroup = 128;

struct BulkCopy {
  void* to;
  const void* from;
  int bytes;
  struct BarrierBits* barrier;
};

// As many bits as a barrier of CUDA has.
struct BarrierBits {
  int32_t bytes;  // still to come
  int16_t left;   // arrivals still to come
  uint8_t arrivals, phase;
};

// One product of a warpgroup: of each thread its sums and its part of a.
struct Product {
  float* sums[kGroup];
  unsigned a[kGroup][4];
  const char* chunk;
  int step;
};

struct Waiter {
  BarrierBits* barrier;
  int thread;
};

struct Hopper {
  std::vector<BulkCopy> copies;
  std::vector<Waiter> waiters;
  Group groups[8];
  std::deque<std::vector<Product>> products[8];
};

inline Hopper& hopper() {
  static Hopper hopper;
  return hopper;
}

inline int group_index() { return device().current / kGroup; }

inline Group& warpgroup() {
  Group& group = hopper().groups[group_index()];
  if (group.size == 0) {
    group.first = group_index() * kGroup;
    group.size = kGroup;
    group.slots.assign(kGroup, nullptr);
  }
  return group;
}

inline void turn(BarrierBits* barrier) {
  if (barrier->left > 0 || barrier->bytes != 0) return;
  barrier->phase ^= 1;
  barrier->left = barrier->arrivals;
  auto& waiters = hopper().waiters;
  const auto here = [=](const Waiter& waiter) { return waiter.barrier == barrier; };
  for (const Waiter& waiter : waiters) {
    if (here(waiter)) device().ready.push_back(waiter.thread);
  }
  waiters.erase(std::remove_if(waiters.begin(), waiters.end(), here), waiters.end());
}

// One of the copies that are on their way arrives.
inline void land() {
  auto& copies = hopper().copies;
  std::swap(copies[device().random() % copies.size()], copies.back());
  const BulkCopy copy = copies.back();
  copies.pop_back();
  std::memcpy(copy.to, copy.from, copy.bytes);
  copy.barrier->bytes -= copy.bytes;
  turn(copy.barrier);
}

}  // namespace cuda_on_cpu

namespace plum::cuda {

struct alignas(8) Barrier {
  cuda_on_cpu::BarrierBits bits;
};

inline void init_barrier(Barrier* barrier, int arrivals) {
  barrier->bits = {0, static_cast<int16_t>(arrivals), static_cast<uint8_t>(arrivals), 0};
}

inline void publish_barriers() {}

inline void arrive(Barrier* barrier) {
  if (barrier->bits.left-- == 0) cuda_on_cpu::fail("more arrivals than a barrier waits for");
  cuda_on_cpu::turn(&barrier->bits);
}

inline void arrive_and_expect(Barrier* barrier, int bytes) {
  barrier->bits.bytes += bytes;
  arrive(barrier);
}

inline void wait(Barrier* barrier, unsigned parity) {
  auto& d = cuda_on_cpu::device();
  auto& h = cuda_on_cpu::hopper();
  d.idle = [] {
    while (cuda_on_cpu::device().ready.empty() && !cuda_on_cpu::hopper().copies.empty()) {
      cuda_on_cpu::land();
    }
  };
  while (barrier->bits.phase == parity) {
    if (!h.copies.empty() && d.random() % 2) {
      cuda_on_cpu::land();
    } else {
      h.waiters.push_back({&barrier->bits, d.current});
      cuda_on_cpu::give_way();
    }
  }
}

inline void copy_bulk(void* shared, const void* global, int bytes, Barrier* barrier) {
  if (bytes % 16 != 0 || reinterpret_cast<uintptr_t>(shared) % 16 != 0 ||
      reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    cuda_on_cpu::fail("a copy that is not aligned to 16 bytes");
  }
  cuda_on_cpu::hopper().copies.push_back({shared, global, bytes, &barrier->bits});
}

inline bool any_of_block(bool value) { return __syncthreads_or(value, 0); }

template <int kCount>
void give_registers() {}
template <int kCount>
void take_registers() {}
inline void fence_products() {}
inline void hold(float (&)[kColumns / 2]) {}

inline void end_products(int line = __builtin_LINE()) {
  int none = 0;
  auto& groups = cuda_on_cpu::hopper().products[cuda_on_cpu::group_index()];
  cuda_on_cpu::meet(cuda_on_cpu::warpgroup(), "end_products", line, &none,
                    [&](int**) { groups.emplace_back(); });
}

inline void multiply_chunk(float (&sums)[kColumns / 2], const unsigned (&a)[4], const void* chunk,
                           int step, int line = __builtin_LINE()) {
  if (reinterpret_cast<uintptr_t>(chunk) % 1024 != 0) cuda_on_cpu::fail("a chunk is not aligned");
  struct Slot {
    float* sums;
    const unsigned* a;
  } slot{sums, a};
  auto& groups = cuda_on_cpu::hopper().products[cuda_on_cpu::group_index()];
  cuda_on_cpu::meet(cuda_on_cpu::warpgroup(), "multiply_chunk", line, &slot, [&](Slot** slots) {
    if (groups.empty()) groups.emplace_back();
    groups.back().emplace_back();
    cuda_on_cpu::Product& product = groups.back().back();
    product.chunk = static_cast<const char*>(chunk);
    product.step = step;
    for (int i = 0; i < cuda_on_cpu::kGroup; ++i) {
      product.sums[i] = slots[i]->sums;
      std::copy_n(slots[i]->a, 4, product.a[i]);
    }
  });
}

inline void make(const cuda_on_cpu::Product& product) {
  const auto value = [](unsigned word, int i) {
    return __half2float({static_cast<uint16_t>(i ? word >> 16 : word)});
  };
  float left[64][16], right[kColumns][16];
  for (int thread = 0; thread < cuda_on_cpu::kGroup; ++thread) {
    const int row = thread / 32 * 16 + thread % 32 / 4, quad = thread % 4;
    for (int i = 0; i < 8; ++i) {
      const int k = quad * 2 + i % 2 + i / 4 * 8;
      left[row + i / 2 % 2 * 8][k] = value(product.a[thread][i / 2], i % 2);
    }
  }
  for (int column = 0; column < kColumns; ++column) {
    for (int k = 0; k < 16; ++k) {
      __half half;
      std::memcpy(&half, product.chunk + chunk_byte(column, product.step * 16 + k), 2);
      right[column][k] = __half2float(half);
    }
  }
  for (int thread = 0; thread < cuda_on_cpu::kGroup; ++thread) {
    const int row = thread / 32 * 16 + thread % 32 / 4, quad = thread % 4;
    for (int i = 0; i < kColumns / 2; ++i) {
      float terms[17];
      const float* x = left[row + i / 2 % 2 * 8];
      const float* y = right[i / 4 * 8 + quad * 2 + i % 2];
      for (int k = 0; k < 16; ++k) terms[k] = x[k] * y[k];
      terms[16] = product.sums[thread][i];
      product.sums[thread][i] = sum_as_tensor_cores(terms, 17);
    }
  }
}

template <int kLatest>
void wait_for_products(int line = __builtin_LINE()) {
  int none = 0;
  auto& groups = cuda_on_cpu::hopper().products[cuda_on_cpu::group_index()];
  cuda_on_cpu::meet(cuda_on_cpu::warpgroup(), "wait_for_products", line, &none, [&](int**) {
    // The last is the one that has not ended.
    for (; groups.size() > kLatest + 1; groups.pop_front()) {
      for (const auto& product : groups.front()) make(product);
    }
  });
}

}  // namespace plum::cuda
