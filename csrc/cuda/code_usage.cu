#include <algorithm>

#include "common.cuh"
#include "plum/code_usage.h"

namespace plum::cuda {
namespace {

constexpr int kThreads = 256;
// Codes a thread: enough to pay for clearing and flushing a block's histogram.
constexpr int kCodesPerThread = 32;
// Histograms up to this many slots live in shared memory (default limit of 48 KiB).
constexpr int kSharedSlots = 12288;

struct Levels {
  int count;
  int offset[kMaxLevels + 1];
};

// counts [total + 1]; slot `total` takes the codes out of range.
template <typename Code, bool kShared>
__global__ void code_usage_kernel(const Code* __restrict__ codes, int64_t num_codes, Levels levels,
                                  unsigned long long* __restrict__ counts) {
  auto* histogram = shared_memory<unsigned int>();
  const int total = levels.offset[levels.count];
  if (kShared) {
    for (int slot = threadIdx.x; slot <= total; slot += kThreads) histogram[slot] = 0;
    __syncthreads();
  }
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < num_codes; i += stride) {
    const int level = static_cast<int>(i % levels.count);
    const int64_t code = codes[i];
    const int size = levels.offset[level + 1] - levels.offset[level];
    const int slot =
        code >= 0 && code < size ? levels.offset[level] + static_cast<int>(code) : total;
    if (kShared) {
      atomicAdd(&histogram[slot], 1u);
    } else {
      atomicAdd(&counts[slot], 1ull);
    }
  }
  if (kShared) {
    __syncthreads();
    for (int slot = threadIdx.x; slot <= total; slot += kThreads) {
      if (histogram[slot])
        atomicAdd(&counts[slot], static_cast<unsigned long long>(histogram[slot]));
    }
  }
}

}  // namespace

template <typename Code>
void code_usage(const Code* codes, int64_t rows, int64_t levels, const int64_t* sizes,
                int64_t* counts, void* stream) {
  const int64_t num_codes = rows * levels;
  if (num_codes == 0) return;
  Levels table{static_cast<int>(levels), {0}};
  for (int64_t level = 0; level < levels; ++level) {
    table.offset[level + 1] = table.offset[level] + static_cast<int>(sizes[level]);
  }
  const int64_t slots = int64_t{table.offset[levels]} + 1;
  // Its 32-bit slots overflow only where a block counts 2^32 codes, which take 64 TiB in all.
  constexpr int64_t kMaxBlocks = 4096;
  const int64_t per_block = int64_t{kThreads} * kCodesPerThread;
  const int blocks =
      static_cast<int>(std::min((num_codes + per_block - 1) / per_block, kMaxBlocks));
  auto* out = reinterpret_cast<unsigned long long*>(counts);
  auto queue = static_cast<cudaStream_t>(stream);
  if (slots <= kSharedSlots) {
    launch(code_usage_kernel<Code, true>, blocks, kThreads, slots * sizeof(unsigned int), queue,
           codes, num_codes, table, out);
  } else {
    launch(code_usage_kernel<Code, false>, blocks, kThreads, 0, queue, codes, num_codes, table,
           out);
  }
  check_launch("code_usage");
}

template void code_usage<int32_t>(const int32_t*, int64_t, int64_t, const int64_t*, int64_t*,
                                  void*);
template void code_usage<int64_t>(const int64_t*, int64_t, int64_t, const int64_t*, int64_t*,
                                  void*);

}  // namespace plum::cuda
