// What only Hopper GPUs have (sm_90a): barriers in shared memory that copies arrive at, and
// products of a warpgroup, four warps of which each keeps 16 rows in its registers.
#pragma once

#include <cstdint>

#include "common.cuh"

namespace plum::cuda {

// Columns of a product, of 64 dimensions each, side by side in shared memory.
constexpr int kColumns = 64, kChunkBytes = kColumns * 64 * 2;

// The byte of a column's k-th fp16 in a chunk: 128 bytes a column, of which 16 are exchanged with
// others by the low bits of the column (the layout that PTX calls 128B swizzle).
__device__ constexpr int chunk_byte(int column, int k) {
  return column * 128 + ((k / 8) ^ (column % 8)) * 16 + k % 8 * 2;
}

#ifndef PLUM_CUDA_ON_CPU

// Its phase turns when all arrivals and all bytes that were announced have come.
struct alignas(8) Barrier {
  uint64_t state;
};

__device__ __forceinline__ unsigned shared_address(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

__device__ __forceinline__ void init_barrier(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

// By the thread that has initialized barriers, before others and copies come to them.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// Arrives, and announces bytes.
__device__ __forceinline__ void arrive_and_expect(Barrier* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// Returns when the phase of this parity, 0 at first, has ended.
__device__ __forceinline__ void wait(Barrier* barrier, unsigned parity) {
  unsigned ended = 0;
  while (!ended) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(ended)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
}

// Copies bytes, a multiple of 16, to shared memory; they arrive at the barrier.
__device__ __forceinline__ void copy_bulk(void* shared, const void* global, int bytes,
                                          Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// Whether a thread of the block has it true. Warps of different roles may come to it at different
// places in the code, which __syncthreads_or does not allow.
__device__ __forceinline__ bool any_of_block(bool value) {
  unsigned found;
  asm volatile(
      "{\n.reg .pred p, q;\n"
      "setp.ne.u32 p, %1, 0;\n"
      "barrier.cta.red.or.pred q, 0, p;\n"
      "selp.u32 %0, 1, 0, q;\n}"
      : "=r"(found)
      : "r"(unsigned{value})
      : "memory");
  return found != 0;
}

// Changes how many registers a thread may have; by whole warpgroups, and those who take wait until
// there are so many.
template <int kCount>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// Comes before products, and after all else that touches their registers.
__device__ __forceinline__ void fence_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Products since the last group become a group.
__device__ __forceinline__ void end_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits for all groups of products but the latest kLatest.
template <int kLatest>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLatest) : "memory");
}

// Nothing that reads or writes the sums moves past this.
__device__ __forceinline__ void hold(float (&sums)[kColumns / 2]) {
#pragma unroll
  for (float& sum : sums) asm volatile("" : "+f"(sum)::"memory");
}

// sums += a b of fp16, [64, 16] and [16, 64], the warpgroup's rows and the step-th 16 dimensions of
// a chunk, whose address is a multiple of 1,024. Sums and `a` are laid out as in `multiply`.
__device__ __forceinline__ void multiply_chunk(float (&d)[kColumns / 2], const unsigned (&a)[4],
                                               const void* chunk, int step) {
  // Address, rows of 8 columns 1,024 bytes apart, 128B swizzle.
  const uint64_t b = uint64_t{(shared_address(chunk) + 32 * step & 0x3ffff) >> 4} |
                     uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, "
      "{%32,%33,%34,%35}, %36, 1, 1, 1, 0;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
        "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
        "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

#endif

}  // namespace plum::cuda

#ifdef PLUM_CUDA_ON_CPU
#include "hopper_on_cpu.h"
#endif
