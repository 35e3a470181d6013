// The residual search on Hopper GPUs: two warpgroups multiply 64 rows each with 64 codewords at a
// time, out of shared memory, where a third one brings them in chunks of 64 dimensions.
#include "hopper.cuh"
#include "residual_search.cuh"

namespace plum::cuda {
namespace {

// Warps that search, and behind them the warpgroup of which one thread loads; registers of each,
// which are for 168 at first.
constexpr int kSearchers = 8, kLoaders = 4;
constexpr int kSearchRegisters = 240, kLoadRegisters = 24;

// 64 codewords as products read them, chunk by chunk, then their biases.
template <int kWidth>
struct GroupTiles {
  static constexpr int kCodes = kColumns, kBytes = kCodes * (2 * kWidth + 4);
  static __device__ int operand_at(int place, int dim) {
    // Of 16 dimensions a lane holds four side by side, where products have two and, 8 behind, two.
    const int quad = dim % 16 / 4, at = dim % 4;
    const int k = dim % 64 / 16 * 16 + quad * 2 + at % 2 + at / 2 * 8;
    return dim / 64 * kChunkBytes + chunk_byte(place, k);
  }
  static __device__ int bias_at(int place) { return kCodes * 2 * kWidth + place * 4; }
};

// See search_rows.
template <int kWidth>
struct GroupScreen {
  using Tiles = GroupTiles<kWidth>;
  static constexpr int kSteps = kWidth / 16, kChunks = kWidth / 64;
  // Chunks in shared memory; each is always in the same slot of them.
  static constexpr int kSlots = kWidth > 256 ? 3 : 4, kRounds = kChunks / kSlots;
  static_assert(kChunks % kSlots == 0);
  static constexpr int kBiasBytes = Tiles::kCodes * 4;

  struct Shared {
    float rows[kSearchers][kWarpRows * kWidth];
    float bias[2][Tiles::kCodes];
    List lists[kSearchers];
    Barrier full[kSlots], empty[kSlots];
  };
  // Chunks come first, at a multiple of 1,024.
  static constexpr int kSharedBytes =
      1024 + kSlots * kChunkBytes + static_cast<int>(sizeof(Shared));

  const Search& search;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t begin = (int64_t{blockIdx.x} * kSearchers + warp) * kWarpRows;
  char* const chunks;
  Shared& shared;
  float* const rows;
  List* const list;
  // Tiles that this thread has had.
  unsigned tiles = 0;

  __device__ __forceinline__ explicit GroupScreen(const Search& search)
      : search(search),
        chunks(aligned_chunks()),
        shared(*reinterpret_cast<Shared*>(chunks + kSlots * kChunkBytes)),
        rows(shared.rows[warp % kSearchers]),
        list(&shared.lists[warp % kSearchers]) {
    if (threadIdx.x == 0) {
      for (Barrier& barrier : shared.full) init_barrier(&barrier, 1);
      for (Barrier& barrier : shared.empty) init_barrier(&barrier, kSearchers);
      publish_barriers();
    }
    __syncthreads();
  }

  static __device__ __forceinline__ char* aligned_chunks() {
    char* memory = shared_memory<char>();
    return memory + (1024 - reinterpret_cast<uintptr_t>(memory) % 1024) % 1024;
  }

  __device__ __forceinline__ bool loads() const { return warp >= kSearchers; }

  __device__ __forceinline__ char* chunk(int index) {
    return chunks + index % kSlots * kChunkBytes;
  }

  __device__ __forceinline__ unsigned parity(int index) const {
    return (tiles * kRounds + index / kSlots) % 2;
  }

  // Brings the codewords of all levels, in the order in which warps run them.
  __device__ __forceinline__ void load() {
    for (int level = 0; level < search.levels.count; ++level) {
      load_level(level);
      if (any(false)) load_level(level);
    }
  }

  __device__ __forceinline__ void load_level(int level) {
    const int last = search.levels.stage[level + 1];
    for (int tile = search.levels.stage[level]; tile < last; ++tile, ++tiles) {
      if (threadIdx.x != 32 * kSearchers) continue;
      const char* from = search.work.stages + int64_t{tile} * Tiles::kBytes;
#pragma unroll
      for (int index = 0; index < kChunks; ++index) {
        Barrier* full = &shared.full[index % kSlots];
        // Of what is empty at first, the phase before has ended.
        wait(&shared.empty[index % kSlots], parity(index) ^ 1);
        arrive_and_expect(full, kChunkBytes + (index == 0 ? kBiasBytes : 0));
        copy_bulk(chunk(index), from + index * kChunkBytes, kChunkBytes, full);
        if (index == 0) {
          copy_bulk(shared.bias[tiles % 2], from + Tiles::bias_at(0), kBiasBytes, full);
        }
      }
    }
    __syncwarp();
  }

  __device__ __forceinline__ void start() {}

  __device__ __forceinline__ void wait_for_rows() { wait_for_groups<0>(); }

  template <typename Visit>
  __device__ __forceinline__ void run(int level, const unsigned (&operand)[kSteps][4],
                                      Visit visit) {
    const int count = search.levels.stage[level + 1] - search.levels.stage[level];
    for (int tile = 0; tile < count; ++tile, ++tiles) {
      wait(&shared.full[0], parity(0));
      const auto* bias = reinterpret_cast<const float2*>(shared.bias[tiles % 2]) + lane % 4;
      float sums[kColumns / 2];
#pragma unroll
      for (int eight = 0; eight < kColumns / 8; ++eight) {
        const float2 start = bias[eight * 4];
        sums[eight * 4] = sums[eight * 4 + 2] = start.x;
        sums[eight * 4 + 1] = sums[eight * 4 + 3] = start.y;
      }
      hold(sums);
#pragma unroll
      for (int index = 0; index < kChunks; ++index) {
        if (index > 0) wait(&shared.full[index % kSlots], parity(index));
        fence_products();
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          multiply_chunk(sums, operand[index * 4 + step], chunk(index), step);
        }
        end_products();
        if (index > 0) {
          wait_for_products<1>();
          if (lane == 0) arrive(&shared.empty[(index - 1) % kSlots]);
        }
      }
      wait_for_products<0>();
      hold(sums);
      if (lane == 0) arrive(&shared.empty[(kChunks - 1) % kSlots]);
#pragma unroll
      for (int i = 0; i < kColumns / 2; ++i) {
        visit(i / 2 % 2, sums[i], (tile * (kColumns / 8) + i / 4) * 2 + i % 2);
      }
    }
  }

  __device__ __forceinline__ bool any(bool value) { return any_of_block(value); }

  __device__ __forceinline__ void rewind(int) { __syncwarp(); }
};

template <int kWidth>
__global__ void __launch_bounds__(32 * (kSearchers + kLoaders), 1)
    wgmma_search_kernel(Search search) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(PLUM_CUDA_ON_CPU)
  GroupScreen<kWidth> screen(search);
  if (screen.loads()) {
    give_registers<kLoadRegisters>();
    screen.load();
  } else {
    take_registers<kSearchRegisters>();
    search_rows<kWidth>(search, screen);
  }
#endif
}

template <typename Call>
auto with_width(int64_t width, Call call) {
  if (width <= 256) return call(std::integral_constant<int, 256>{});
  return call(std::integral_constant<int, 384>{});
}

}  // namespace

int64_t residual_quantize_wgmma_workspace(int64_t width, const int64_t* sizes, int64_t levels) {
  return with_width(
      width, [&](auto built) { return workspace_bytes<built, GroupTiles<built>>(sizes, levels); });
}

void residual_quantize_wgmma(const void* x, RowType type, int64_t rows, int64_t width,
                             const float* codebooks, const int64_t* sizes, int64_t levels,
                             void* workspace, int32_t* codes, float* norms, float* residual,
                             int64_t* first_bad, void* stream) {
  with_width(width, [&](auto built) {
    using Screen = GroupScreen<built>;
    const Search search = make_search<typename Screen::Tiles>(x, type, rows, width, sizes, levels,
                                                              codes, norms, residual, first_bad);
    launch_search<built, typename Screen::Tiles>(search, wgmma_search_kernel<built>, kSearchers,
                                                 kLoaders, Screen::kSharedBytes, codebooks,
                                                 workspace, static_cast<cudaStream_t>(stream));
    return 0;
  });
}

}  // namespace plum::cuda
