// What every CUDA launcher needs, and the instructions that C++ has no name for.
#pragma once

#ifdef PLUM_CUDA_ON_CPU
#include "cuda_on_cpu.h"
#else
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <stdexcept>
#include <string>

namespace plum::cuda {

// Throws std::runtime_error when the launch before it failed.
inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(error));
  }
}

#ifndef PLUM_CUDA_ON_CPU

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared,
            cudaStream_t stream, Arguments... arguments) {
  kernel<<<grid, block, shared, stream>>>(arguments...);
}

// The shared memory whose size the launch gives.
template <typename T>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ float4 memory[];
  return reinterpret_cast<T*>(memory);
}

// Copies 16 bytes to shared memory. They belong to the thread's next group of copies, and are there
// for the thread when it has waited for that.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}

__device__ __forceinline__ void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all groups but the latest kLatest.
template <int kLatest>
__device__ __forceinline__ void wait_for_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLatest) : "memory");
}

// sum += a b of fp16, [16, 16] and [16, 8], each in the registers of a warp. Volatile, or it may
// move to where not all lanes come.
__device__ __forceinline__ void multiply(float (&sum)[4], const unsigned (&a)[4], unsigned b0,
                                         unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#endif

}  // namespace plum::cuda
