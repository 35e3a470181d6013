// Codebooks in the layout of the residual search: copied with padding, and as fp16 operands of the
// tensor cores, shifted by their level's center and scaled.
#pragma once

#include <cstdint>

#include "common.cuh"
#include "plum/code_usage.h"

namespace plum::cuda {
namespace {

constexpr unsigned kAll = 0xffffffffu;
// Bias of the padding and of repeated codewords: below every score, and finite when tagged.
constexpr float kNone = -3e38f;
// The largest norm of a level's operands is scaled to [2^4, 2^5): fp16 then holds rows 2^11 times
// as long.
constexpr int kExponent = 5;
// Codewords before it in which a repeated codeword is looked for.
constexpr int kRepeatWindow = 4096;

// Operands and biases of a stage of codewords as warps read them: some 6 to 9 KiB.
template <int kWidth>
struct WarpTiles {
  static constexpr int kCodes = kWidth > 256 ? 8 : 4096 / kWidth;
  static constexpr int kBytes = kCodes * (2 * kWidth + 4);
  // A lane reads, of one codeword in eight, four dimensions of each of two steps of 16.
  static __device__ int operand_at(int place, int dim) {
    const int step = dim / 16, reader = place % 8 * 4 + dim % 16 / 4;
    const int chunk = (place / 8 * (kWidth / 32) + step / 2) * 32 + reader;
    return (chunk * 8 + step % 2 * 4 + dim % 4) * 2;
  }
  static __device__ int bias_at(int place) { return kCodes * 2 * kWidth + place * 4; }
};

struct Levels {
  int count;
  int size[kMaxLevels], first[kMaxLevels], stage[kMaxLevels + 1];
};

// What a level's scores are bounded with; scaled, but for the scale itself and the longest norm.
struct LevelBounds {
  unsigned long long longest;  // bits of a double
  float scale;
  unsigned norm, error;  // bits of floats
};

struct Workspace {
  float* books;                // [sum of sizes, kWidth], padded with zeros
  float* centers;              // [levels, kWidth]
  float* shifts;               // [levels, kWidth], the centers, scaled and negative
  char* stages;                // [stages, Tiles::kBytes]
  LevelBounds* bounds;         // [levels]
  unsigned long long* hashes;  // [sum of sizes]
};

__global__ void clear_bounds(LevelBounds* bounds, int levels) {
  const int level = blockIdx.x * blockDim.x + threadIdx.x;
  if (level < levels) bounds[level] = LevelBounds{0, 1.f, 0, 0};
}

// The mean of each level's codewords; a block takes 32 dimensions.
constexpr int kCenterParts = 32;
__global__ void find_centers(const float* __restrict__ codebooks, Levels levels, int width,
                             int stride, float* __restrict__ centers) {
  __shared__ double parts[kCenterParts][32];
  const int level = blockIdx.y, lane = threadIdx.x % 32, part = threadIdx.x / 32;
  const int dim = blockIdx.x * 32 + lane;
  double sum = 0;
  if (dim < width) {
    const float* book = codebooks + int64_t{levels.first[level]} * width + dim;
#pragma unroll 8
    for (int code = part; code < levels.size[level]; code += kCenterParts) {
      sum += book[int64_t{code} * width];
    }
  }
  parts[part][lane] = sum;
  __syncthreads();
  if (part == 0) {
    for (int other = 1; other < kCenterParts; ++other) sum += parts[other][lane];
    centers[level * stride + dim] = static_cast<float>(sum / levels.size[level]);
  }
}

template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
  for (int step = 16; step; step /= 2) value += __shfl_xor_sync(kAll, value, step);
  return value;
}

__device__ __forceinline__ int level_of(const Levels& levels, int row) {
  int level = 0;
  while (level + 1 < levels.count && row >= levels.first[level + 1]) ++level;
  return level;
}

// Copies a codeword with padding, hashes its bits, and finds the longest of its level; a warp each.
template <int kWidth>
__global__ void copy_codewords(const float* __restrict__ codebooks, Levels levels, int total,
                               int width, Workspace work, unsigned long long* first_bad) {
  const int row = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
  if (row >= total) return;
  const int level = level_of(levels, row);
  double sum = 0;
  unsigned long long hash = 0;
  bool finite = true;
#pragma unroll
  for (int dim = lane; dim < kWidth; dim += 32) {
    const float value = dim < width ? codebooks[int64_t{row} * width + dim] : 0.f;
    work.books[int64_t{row} * kWidth + dim] = value;
    const double shifted = static_cast<double>(value) - work.centers[level * kWidth + dim];
    sum += shifted * shifted;
    finite &= isfinite(value);
    hash += __float_as_uint(value) * (0x9E3779B97F4A7C15ull * (dim + 1) | 1);
  }
  sum = warp_sum(sum);
  hash = warp_sum(hash);
  finite = __all_sync(kAll, finite);
  if (lane) return;
  work.hashes[row] = hash;
  atomicMax(&work.bounds[level].longest, __double_as_longlong(sqrt(sum)));
  if (!finite) atomicMin(first_bad, static_cast<unsigned long long>(row));
}

// Whether two codewords have the same bits; called by a whole warp.
template <int kWidth>
__device__ bool same_codewords(const float* a, const float* b, int lane) {
  bool differ = false;
#pragma unroll
  for (int dim = lane; dim < kWidth; dim += 32) {
    differ |= __float_as_uint(a[dim]) != __float_as_uint(b[dim]);
  }
  return !__any_sync(kAll, differ);
}

// Whether a codeword has the bits of one before it in its level; called by a whole warp.
template <int kWidth>
__device__ bool is_repeat(const Workspace& work, int first, int code, int lane) {
  // Hashes of this many codewords are asked for together.
  constexpr int kTogether = 8;
  const unsigned long long* hashes = work.hashes + first;
  const float* books = work.books + int64_t{first} * kWidth;
  const unsigned long long hash = hashes[code];
  for (int begin = max(0, code - kRepeatWindow); begin < code; begin += 32 * kTogether) {
    unsigned matches = 0;
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int other = begin + 32 * i + lane;
      if (other < code && hashes[other] == hash) matches |= 1u << i;
    }
    if (!__any_sync(kAll, matches)) continue;
    for (int i = 0; i < kTogether; ++i) {
      for (unsigned left = __ballot_sync(kAll, matches >> i & 1); left; left &= left - 1) {
        const int other = begin + 32 * i + __ffs(left) - 1;
        if (same_codewords<kWidth>(books + int64_t{code} * kWidth, books + int64_t{other} * kWidth,
                                   lane)) {
          return true;
        }
      }
    }
  }
  return false;
}

// Writes operands and biases where `Tiles` has them; a warp for each codeword, padding too.
template <int kWidth, typename Tiles>
__global__ void pack_operands(Levels levels, Workspace work) {
  constexpr int kCodes = Tiles::kCodes;
  const int padded = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
  const int stage = padded / kCodes, place = padded % kCodes;
  if (stage >= levels.stage[levels.count]) return;
  int level = 0;
  while (stage >= levels.stage[level + 1]) ++level;
  const int first = levels.first[level], code = padded - levels.stage[level] * kCodes;
  const bool real = code < levels.size[level];
  LevelBounds& bounds = work.bounds[level];
  const double longest = __longlong_as_double(bounds.longest);
  const int power = longest > 0 ? min(max(kExponent - 1 - ilogb(longest), -100), 100) : 0;
  const double scale = scalbn(1.0, power);
  double norm = 0, error = 0;
  char* at = work.stages + int64_t{stage} * Tiles::kBytes;
#pragma unroll 4
  for (int dim = lane; dim < kWidth; dim += 32) {
    double value = 0;
    if (real) {
      value = work.books[int64_t{first + code} * kWidth + dim];
      value = (value - work.centers[level * kWidth + dim]) * scale;
    }
    const __half half = __double2half(value);
    const double rest = value - __half2float(half);
    if (code == 0) {
      work.shifts[level * kWidth + dim] =
          static_cast<float>(-scale * work.centers[level * kWidth + dim]);
    }
    norm += value * value;
    error += rest * rest;
    *reinterpret_cast<__half*>(at + Tiles::operand_at(place, dim)) = half;
  }
  norm = warp_sum(norm);
  error = warp_sum(error);
  const bool skipped = !real || is_repeat<kWidth>(work, first, code, lane);
  if (lane) return;
  *reinterpret_cast<float*>(at + Tiles::bias_at(place)) =
      skipped ? kNone : static_cast<float>(-norm / 2);
  if (skipped) return;
  atomicMax(&bounds.norm, __float_as_uint(static_cast<float>(sqrt(norm) * 1.000001)));
  atomicMax(&bounds.error, __float_as_uint(static_cast<float>(sqrt(error) * 1.000001)));
  if (code == 0) bounds.scale = static_cast<float>(scale);
}

constexpr int64_t aligned(int64_t bytes) { return (bytes + 255) / 256 * 256; }

template <typename Tiles>
Levels lay_out(const int64_t* sizes, int64_t levels) {
  Levels table{static_cast<int>(levels), {}, {}, {}};
  int first = 0;
  for (int level = 0; level < table.count; ++level) {
    table.size[level] = static_cast<int>(sizes[level]);
    table.first[level] = first;
    first += table.size[level];
    constexpr int kCodes = Tiles::kCodes;
    table.stage[level + 1] = table.stage[level] + (table.size[level] + kCodes - 1) / kCodes;
  }
  return table;
}

inline int codewords_of(const Levels& levels) {
  return levels.first[levels.count - 1] + levels.size[levels.count - 1];
}

// Places the parts of the workspace behind one another; returns its bytes.
template <int kWidth, typename Tiles>
int64_t place_parts(const Levels& levels, char* base, Workspace* work) {
  const int64_t total = codewords_of(levels);
  int64_t end = 0;
  const auto part = [&](int64_t bytes) {
    char* at = base + end;
    end += aligned(bytes);
    return at;
  };
  work->books = reinterpret_cast<float*>(part(total * kWidth * 4));
  work->centers = reinterpret_cast<float*>(part(int64_t{levels.count} * kWidth * 4));
  work->shifts = reinterpret_cast<float*>(part(int64_t{levels.count} * kWidth * 4));
  work->stages = part(int64_t{levels.stage[levels.count]} * Tiles::kBytes);
  work->bounds = reinterpret_cast<LevelBounds*>(
      part(levels.count * static_cast<int64_t>(sizeof(LevelBounds))));
  work->hashes = reinterpret_cast<unsigned long long*>(part(total * 8));
  return end;
}

// Fills the workspace; lowers first_bad to the first codeword that is not finite.
template <int kWidth, typename Tiles>
void pack(const float* codebooks, const Levels& levels, int width, const Workspace& work,
          unsigned long long* first_bad, cudaStream_t stream) {
  const int total = codewords_of(levels);
  const int padded = levels.stage[levels.count] * Tiles::kCodes;
  launch(clear_bounds, 1, kMaxLevels, 0, stream, work.bounds, levels.count);
  launch(find_centers, dim3(kWidth / 32, levels.count), 32 * kCenterParts, 0, stream, codebooks,
         levels, width, kWidth, work.centers);
  launch(copy_codewords<kWidth>, (total + 7) / 8, 256, 0, stream, codebooks, levels, total, width,
         work, first_bad);
  launch(pack_operands<kWidth, Tiles>, (padded + 7) / 8, 256, 0, stream, levels, work);
}

}  // namespace
}  // namespace plum::cuda
