// The residual search on any GPU, in one launch behind the packing: a warp multiplies its 16 rows
// with codewords that pass through shared memory in stages, which all warps of a block share.
#include "residual_search.cuh"

namespace plum::cuda {
namespace {

constexpr int kMaxWarps = 8;
// Stages in shared memory: one that is read, and those that are on their way.
constexpr int kSlots = 4;
// Blocks that a multiprocessor holds; operands and rows take the registers and the shared memory.
template <int kWidth>
constexpr int kBlocks = kWidth > 128 ? 1 : 2;

// See search_rows.
template <int kWidth>
struct WarpScreen {
  using Tiles = WarpTiles<kWidth>;
  static constexpr int kSteps = kWidth / 16, kCodes = Tiles::kCodes, kBytes = Tiles::kBytes;

  const Search& search;
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t begin = (int64_t{blockIdx.x} * warps + warp) * kWarpRows;
  float* const rows = shared_memory<float>() + warp * kWarpRows * kWidth;
  char* const buffers = shared_memory<char>() + warps * kWarpRows * kWidth * sizeof(float);
  List* const list = reinterpret_cast<List*>(buffers + kSlots * kBytes) + warp;

  __device__ __forceinline__ explicit WarpScreen(const Search& search) : search(search) {}

  static int shared_bytes(int warps) {
    const int rows = kWarpRows * kWidth * static_cast<int>(sizeof(float));
    return warps * (rows + static_cast<int>(sizeof(List))) + kSlots * kBytes;
  }

  __device__ __forceinline__ void prefetch(int stage) {
    if (stage < search.levels.stage[search.levels.count]) {
      const char* from = search.work.stages + int64_t{stage} * kBytes;
      char* to = buffers + stage % kSlots * kBytes;
      for (int at = threadIdx.x * 16; at < kBytes; at += blockDim.x * 16) {
        copy_async(to + at, from + at);
      }
    }
    end_group();
  }

  __device__ __forceinline__ void prefetch_from(int stage) {
#pragma unroll
    for (int ahead = 0; ahead < kSlots - 1; ++ahead) prefetch(stage + ahead);
  }

  __device__ __forceinline__ void start() { prefetch_from(0); }

  __device__ __forceinline__ void wait_for_rows() { wait_for_groups<kSlots - 1>(); }

  template <typename Visit>
  __device__ __forceinline__ void run(int level, const unsigned (&operand)[kSteps][4],
                                      Visit visit) {
    // Tiles of eight codewords at once, and chains of products of each: enough of them that none
    // waits for another.
    constexpr int kTiles = kCodes / 8 < 2 ? 1 : 2, kChains = 4 / kTiles;
    [[maybe_unused]] constexpr int kUnrolled = kCodes / 8 / kTiles < 4 ? kCodes / 8 / kTiles : 4;
    const int first_stage = search.levels.stage[level];
    const int last_stage = search.levels.stage[level + 1];
    for (int stage = first_stage; stage < last_stage; ++stage) {
      wait_for_groups<kSlots - 2>();
      // The stage has arrived for all, and all are done with the one before it.
      __syncthreads();
      prefetch(stage + kSlots - 1);
      const char* buffer = buffers + stage % kSlots * kBytes;
      const auto* fragments = reinterpret_cast<const uint4*>(buffer) + lane;
      const auto* bias = reinterpret_cast<const float2*>(buffer + Tiles::bias_at(0)) + lane % 4;
#pragma unroll kUnrolled
      for (int tile = 0; tile < kCodes / 8; tile += kTiles) {
        float sums[kTiles][kChains][4] = {};
#pragma unroll
        for (int each = 0; each < kTiles; ++each) {
          const float2 start = bias[(tile + each) * 4];
          sums[each][0][0] = sums[each][0][2] = start.x;
          sums[each][0][1] = sums[each][0][3] = start.y;
        }
#pragma unroll
        for (int pair = 0; pair < kSteps / 2; ++pair) {
#pragma unroll
          for (int each = 0; each < kTiles; ++each) {
            const uint4 b = fragments[((tile + each) * (kSteps / 2) + pair) * 32];
            multiply(sums[each][2 * pair % kChains], operand[2 * pair], b.x, b.y);
            multiply(sums[each][(2 * pair + 1) % kChains], operand[2 * pair + 1], b.z, b.w);
          }
        }
#pragma unroll
        for (int each = 0; each < kTiles; ++each) {
          const int place = ((stage - first_stage) * (kCodes / 8) + tile + each) * 2;
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float score = sums[each][0][i] + sums[each][1][i];
            if (kChains == 4) score += sums[each][kChains - 2][i] + sums[each][kChains - 1][i];
            visit(i / 2, score, place + i % 2);
          }
        }
      }
    }
  }

  __device__ __forceinline__ bool any(bool value) { return __syncthreads_or(value); }

  __device__ __forceinline__ void rewind(int level) {
    wait_for_groups<0>();
    __syncthreads();
    prefetch_from(search.levels.stage[level]);
  }
};

template <int kWidth>
__global__ void __launch_bounds__(32 * kMaxWarps, kBlocks<kWidth>) search_kernel(Search search) {
  WarpScreen<kWidth> screen(search);
  search_rows<kWidth>(search, screen);
}

// Calls with the least width that is built and holds `width`.
template <typename Call>
auto with_width(int64_t width, Call call) {
  if (width <= 32) return call(std::integral_constant<int, 32>{});
  if (width <= 64) return call(std::integral_constant<int, 64>{});
  if (width <= 128) return call(std::integral_constant<int, 128>{});
  if (width <= 256) return call(std::integral_constant<int, 256>{});
  return call(std::integral_constant<int, 384>{});
}

}  // namespace

int64_t residual_quantize_workspace(int64_t width, const int64_t* sizes, int64_t levels) {
  return with_width(
      width, [&](auto built) { return workspace_bytes<built, WarpTiles<built>>(sizes, levels); });
}

void residual_quantize(const void* x, RowType type, int64_t rows, int64_t width,
                       const float* codebooks, const int64_t* sizes, int64_t levels,
                       void* workspace, int32_t* codes, float* norms, float* residual,
                       int64_t* first_bad, void* stream) {
  with_width(width, [&](auto built) {
    using Screen = WarpScreen<built>;
    const Search search = make_search<typename Screen::Tiles>(x, type, rows, width, sizes, levels,
                                                              codes, norms, residual, first_bad);
    const int room = shared_memory_of_a_block();
    int warps = kMaxWarps;
    while (warps > 1 && Screen::shared_bytes(warps) > room) --warps;
    launch_search<built, typename Screen::Tiles>(search, search_kernel<built>, warps, 0,
                                                 Screen::shared_bytes(warps), codebooks, workspace,
                                                 static_cast<cudaStream_t>(stream));
    return 0;
  });
}

}  // namespace plum::cuda
