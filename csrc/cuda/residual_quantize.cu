// Exact nearest codeword of a row's residual, level by level, in one launch behind the packing.
//
// With t = r - center and c' = c - center, the nearest codeword has the largest score
// t.c' - |c'|^2/2. A screen on tensor cores (fp16 products, fp32 sums) keeps the three best scores
// of each lane; what its error bound cannot tell apart is compared by fp64 distances, what those
// cannot tell apart by fp64 distances summed in the order of the dimensions, ties to the lowest
// code. A warp takes 16 rows through all levels: their residuals stay in shared memory, the operand
// of the screen in registers. Codewords pass through shared memory in stages that all warps share.
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "common.cuh"
#include "plum/code_usage.h"
#include "plum/residual_quantize.h"

namespace plum::cuda {
namespace {

using cpu::RowType;

constexpr int kWarpRows = 16;
constexpr int kMaxWarps = 8;
// Bias of the padding and of repeated codewords: below every score, and finite when tagged.
constexpr float kNone = -3e38f;
// The largest norm of a level's operands is scaled to [2^4, 2^5): fp16 then holds rows 2^11 times
// as long.
constexpr int kExponent = 5;
// Norm of a scaled row up to which no element overflows in fp16.
constexpr float kLongest = 60000.f;
// Codewords before it in which a repeated codeword is looked for.
constexpr int kRepeatWindow = 4096;
constexpr unsigned kAll = 0xffffffffu;
// Candidates that a warp lists of the rows of which three or more are in one lane.
constexpr int kListed = 160;

// Codewords of a stage: some 8 to 12 KiB of operands.
template <int kWidth>
constexpr int kStage = kWidth >= 256 ? 16 : 4096 / kWidth;
template <int kWidth>
constexpr int kStageBytes = kStage<kWidth> * (2 * kWidth + 4);

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
  char* stages;                // [stages, kStageBytes]
  LevelBounds* bounds;         // [levels]
  unsigned long long* hashes;  // [sum of sizes]
};

__global__ void clear_bounds(LevelBounds* bounds, int levels) {
  const int level = blockIdx.x * blockDim.x + threadIdx.x;
  if (level < levels) bounds[level] = LevelBounds{0, 1.f, 0, 0};
}

// The mean of each level's codewords; a block takes 32 dimensions.
__global__ void find_centers(const float* __restrict__ codebooks, Levels levels, int width,
                             int stride, float* __restrict__ centers) {
  __shared__ double parts[8][32];
  const int level = blockIdx.y, lane = threadIdx.x % 32, part = threadIdx.x / 32;
  const int dim = blockIdx.x * 32 + lane;
  double sum = 0;
  if (dim < width) {
    const float* book = codebooks + int64_t{levels.first[level]} * width + dim;
    for (int code = part; code < levels.size[level]; code += 8) sum += book[int64_t{code} * width];
  }
  parts[part][lane] = sum;
  __syncthreads();
  if (part == 0) {
    for (int other = 1; other < 8; ++other) sum += parts[other][lane];
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
__global__ void copy_codewords(const float* __restrict__ codebooks, Levels levels, int total,
                               int width, int stride, Workspace work,
                               unsigned long long* first_bad) {
  const int row = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
  if (row >= total) return;
  const int level = level_of(levels, row);
  double sum = 0;
  unsigned long long hash = 0;
  bool finite = true;
  for (int dim = lane; dim < stride; dim += 32) {
    const float value = dim < width ? codebooks[int64_t{row} * width + dim] : 0.f;
    work.books[int64_t{row} * stride + dim] = value;
    const double shifted = static_cast<double>(value) - work.centers[level * stride + dim];
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

// Whether a codeword has the bits of one before it in its level; called by a whole warp.
__device__ bool is_repeat(const Workspace& work, int first, int code, int stride, int lane) {
  bool found = false;
  const unsigned long long hash = work.hashes[first + code];
  for (int other = max(0, code - kRepeatWindow) + lane; other < code; other += 32) {
    if (work.hashes[first + other] != hash) continue;
    const float* a = work.books + int64_t{first + code} * stride;
    const float* b = work.books + int64_t{first + other} * stride;
    int dim = 0;
    while (dim < stride && __float_as_uint(a[dim]) == __float_as_uint(b[dim])) ++dim;
    found |= dim == stride;
  }
  return __any_sync(kAll, found);
}

// Writes the operands in the order in which lanes read them; a warp for each codeword, padding too.
template <int kWidth>
__global__ void pack_operands(Levels levels, Workspace work) {
  constexpr int kCodes = kStage<kWidth>;
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
  char* at = work.stages + int64_t{stage} * kStageBytes<kWidth>;
  for (int dim = lane; dim < kWidth; dim += 32) {
    double value = 0;
    if (real) {
      value = work.books[int64_t{first + code} * kWidth + dim];
      value = (value - work.centers[level * kWidth + dim]) * scale;
    }
    const __half half = __double2half(value);
    const double rest = value - __half2float(half);
    norm += value * value;
    error += rest * rest;
    // A lane reads, of one codeword in eight, four dimensions of each of two steps of 16.
    const int step = dim / 16, reader = place % 8 * 4 + dim % 16 / 4;
    const int chunk = (place / 8 * (kWidth / 32) + step / 2) * 32 + reader;
    reinterpret_cast<__half*>(at)[chunk * 8 + step % 2 * 4 + dim % 4] = half;
  }
  norm = warp_sum(norm);
  error = warp_sum(error);
  const bool skipped = !real || is_repeat(work, first, code, kWidth, lane);
  if (lane) return;
  reinterpret_cast<float*>(at + kCodes * 2 * kWidth)[place] =
      skipped ? kNone : static_cast<float>(-norm / 2);
  atomicMax(&bounds.norm, __float_as_uint(static_cast<float>(sqrt(norm) * 1.000001)));
  atomicMax(&bounds.error, __float_as_uint(static_cast<float>(sqrt(error) * 1.000001)));
  if (code == 0) bounds.scale = static_cast<float>(scale);
}

struct Search {
  const void* x;
  RowType type;
  int64_t rows;
  int width;
  Levels levels;
  Workspace work;
  int32_t* codes;
  float* norms;
  float* residual;
  unsigned long long* first_bad;
};

__device__ __forceinline__ float load_element(const Search& search, int64_t at) {
  if (search.type == RowType::kFloat32) return static_cast<const float*>(search.x)[at];
  if (search.type == RowType::kFloat16) {
    return __half2float(static_cast<const __half*>(search.x)[at]);
  }
  return __uint_as_float(unsigned{static_cast<const unsigned short*>(search.x)[at]} << 16);
}

// Where a warp keeps four dimensions of one of its rows: the lanes that read two rows together
// take different banks.
template <int kWidth>
__device__ __forceinline__ float4& quarter(float* rows, int row, int four) {
  return reinterpret_cast<float4*>(rows + row * kWidth)[four ^ (row % 2 * 4)];
}

__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}

__device__ __forceinline__ void multiply(float (&sum)[4], const unsigned (&a)[4], unsigned b0,
                                         unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The three best scores that a lane has seen of a row, each with its place in the low bits.
struct Best {
  float first = kNone, second = kNone, third = kNone;

  __device__ __forceinline__ void add(float score, int place, int mask) {
    const float tagged = __int_as_float((__float_as_int(score) & ~mask) | place);
    const float lower = fminf(first, tagged);
    first = fmaxf(first, tagged);
    const float lowest = fminf(second, lower);
    second = fmaxf(second, lower);
    third = fmaxf(third, lowest);
  }
};

template <typename T>
__device__ __forceinline__ T quad_sum(T value) {
  value += __shfl_xor_sync(kAll, value, 1);
  return value + __shfl_xor_sync(kAll, value, 2);
}

__device__ __forceinline__ float quad_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(kAll, value, 1));
  return fmaxf(value, __shfl_xor_sync(kAll, value, 2));
}

// Codes of a lane are two in eight.
__device__ __forceinline__ int code_at(int place, int quad_lane) {
  return place / 2 * 8 + quad_lane * 2 + place % 2;
}

// The squared distance of a row and a codeword by the whole warp; its relative error is below
// (kWidth + 32) 2^-52.
template <int kWidth>
__device__ double distance(float* rows, int row, const float* __restrict__ codeword, int lane) {
  double sum = 0;
  for (int four = lane; four < kWidth / 4; four += 32) {
    const float4 r = quarter<kWidth>(rows, row, four);
    const float4 c = __ldg(reinterpret_cast<const float4*>(codeword) + four);
    const double x = double{r.x} - c.x, y = double{r.y} - c.y;
    const double z = double{r.z} - c.z, w = double{r.w} - c.w;
    sum += (x * x + y * y) + (z * z + w * w);
  }
  return warp_sum(sum);
}

// As above, summed in the order of the dimensions and without fused operations.
template <int kWidth>
__device__ double ordered_distance(float* rows, int row, const float* __restrict__ codeword) {
  double sum = 0;
  for (int four = 0; four < kWidth / 4; ++four) {
    const float4 r = quarter<kWidth>(rows, row, four);
    const float4 c = __ldg(reinterpret_cast<const float4*>(codeword) + four);
    for (const auto& [a, b] : {make_float2(r.x, c.x), make_float2(r.y, c.y), make_float2(r.z, c.z),
                               make_float2(r.w, c.w)}) {
      const double difference = __dsub_rn(a, b);
      sum = __dadd_rn(sum, __dmul_rn(difference, difference));
    }
  }
  return sum;
}

// What a warp lists: a row above kCodeBits and a code.
constexpr int kCodeBits = 24;
struct List {
  int count;
  int entries[kListed];
};

// The exact nearest codeword of one of the warp's rows. Its candidates are listed, or in the four
// lanes from `leader` on: those of their best scores that reach the threshold, all codes of a lane
// whose third does too. Called by the whole warp.
template <int kWidth>
__device__ int decide(float* rows, int row, const Best& best, float threshold, int leader, int mask,
                      const float* __restrict__ book, int size, const List* list, int lane) {
  constexpr double kSlack = 1 + (kWidth + 32) * 0x1p-50;
  threshold = __shfl_sync(kAll, threshold, leader);
  double least = INFINITY, next = INFINITY, ordered = INFINITY;
  int winner = 0;
  int pass = 0;
  const auto consider = [&](int code) {
    const float* codeword = book + int64_t{code} * kWidth;
    const double found = distance<kWidth>(rows, row, codeword, lane);
    if (pass == 0) {
      next = fmin(next, fmax(least, found));
      if (found < least) winner = code;
      least = fmin(least, found);
    } else if (found <= least * kSlack) {
      const double exact = ordered_distance<kWidth>(rows, row, codeword);
      if (exact < ordered || (exact == ordered && code < winner)) winner = code;
      ordered = fmin(ordered, exact);
    }
  };
  for (; pass < 2; ++pass) {
    if (list != nullptr) {
      for (int i = 0; i < list->count; ++i) {
        const int entry = list->entries[i];
        if (entry >> kCodeBits == row) consider(entry & ((1 << kCodeBits) - 1));
      }
    }
    for (int quad_lane = 0; list == nullptr && quad_lane < 4; ++quad_lane) {
      const float first = __shfl_sync(kAll, best.first, leader + quad_lane);
      const float second = __shfl_sync(kAll, best.second, leader + quad_lane);
      const float third = __shfl_sync(kAll, best.third, leader + quad_lane);
      const bool whole = !(third < threshold);
      const int count = whole ? (size + 7) / 8 * 2 : !(first < threshold) + !(second < threshold);
      for (int i = 0; i < count; ++i) {
        const int place = whole ? i : __float_as_int(i ? second : first) & mask;
        const int code = code_at(place, quad_lane);
        if (code < size) consider(code);
      }
    }
    if (next > least * kSlack) break;
  }
  return winner;
}

template <int kWidth>
__global__ void __launch_bounds__(32 * kMaxWarps, kWidth > 256 ? 1 : 2)
    search_kernel(Search search) {
  constexpr int kSteps = kWidth / 16, kCodes = kStage<kWidth>, kBytes = kStageBytes<kWidth>;
  // Steps whose codewords are asked for together.
  constexpr int kAhead = kSteps < 4 ? kSteps : 4;
  // The largest relative error of a sum of squares, and what flushed denormals hide.
  constexpr float kInflated = 1 + (kWidth + 32) * 0x1p-23f, kFlushed = 0x1p-57f;
  extern __shared__ float4 shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int group = lane / 4, quad_lane = lane % 4;
  float* rows = reinterpret_cast<float*>(shared) + warp * kWarpRows * kWidth;
  char* buffers = reinterpret_cast<char*>(shared) + warps * kWarpRows * kWidth * sizeof(float);
  List* list = reinterpret_cast<List*>(buffers + 2 * kBytes) + warp;
  const Levels& levels = search.levels;
  const Workspace& work = search.work;
  const int stages = levels.stage[levels.count];
  const int64_t begin = (int64_t{blockIdx.x} * warps + warp) * kWarpRows;

  const auto prefetch = [&](int stage) {
    if (stage < stages) {
      const char* from = work.stages + int64_t{stage} * kBytes;
      char* to = buffers + stage % 2 * kBytes;
      for (int at = threadIdx.x * 16; at < kBytes; at += blockDim.x * 16) {
        copy_async(to + at, from + at);
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  prefetch(0);

  const bool whole_fours = search.type == RowType::kFloat32 && search.width == kWidth &&
                           reinterpret_cast<uintptr_t>(search.x) % 16 == 0;
#pragma unroll 8
  for (int at = lane; at < kWarpRows * kWidth / 4; at += 32) {
    const int row = at / (kWidth / 4), four = at % (kWidth / 4);
    float4 value = make_float4(0, 0, 0, 0);
    if (begin + row < search.rows) {
      if (whole_fours) {
        value = __ldcs(static_cast<const float4*>(search.x) + begin * (kWidth / 4) + at);
      } else {
        const int64_t first = (begin + row) * search.width;
        float* each = &value.x;
        for (int i = 0; i < 4; ++i) {
          if (four * 4 + i < search.width) each[i] = load_element(search, first + four * 4 + i);
        }
      }
    }
    quarter<kWidth>(rows, row, four) = value;
  }
  __syncwarp();

  int code[2] = {0, 0};
  bool bad[2] = {false, false};
  for (int level = 0; level <= levels.count; ++level) {
    const int here = min(level, levels.count - 1), before = max(level - 1, 0);
    const LevelBounds bounds = work.bounds[here];
    const float* center = work.centers + here * kWidth;
    const float* books = work.books + int64_t{levels.first[before]} * kWidth;
    float squares[2] = {0, 0}, shifted[2] = {0, 0}, errors[2] = {0, 0}, largest[2] = {0, 0};
    unsigned operand[kSteps][4];
    const float4* codewords[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      codewords[half] = reinterpret_cast<const float4*>(books + int64_t{code[half]} * kWidth);
    }
    float4 ahead[kAhead][2];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int four = step * 4 + quad_lane;
      const float4 middle = __ldg(reinterpret_cast<const float4*>(center) + four);
      if (level > 0 && step % kAhead == 0) {
#pragma unroll
        for (int each = 0; each < 2 * kAhead; ++each) {
          ahead[each / 2][each % 2] =
              __ldg(codewords[each % 2] + (step + each / 2) * 4 + quad_lane);
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float4& kept = quarter<kWidth>(rows, group + 8 * half, four);
        float4 r = kept;
        if (level > 0) {
          const float4 c = ahead[step % kAhead][half];
          r = make_float4(r.x - c.x, r.y - c.y, r.z - c.z, r.w - c.w);
          kept = r;
        }
        const float4 t =
            make_float4((r.x - middle.x) * bounds.scale, (r.y - middle.y) * bounds.scale,
                        (r.z - middle.z) * bounds.scale, (r.w - middle.w) * bounds.scale);
        const __half2 low = __floats2half2_rn(t.x, t.y), high = __floats2half2_rn(t.z, t.w);
        const float2 a = __half22float2(low), b = __half22float2(high);
        const float4 e = make_float4(t.x - a.x, t.y - a.y, t.z - b.x, t.w - b.y);
        squares[half] += (r.x * r.x + r.y * r.y) + (r.z * r.z + r.w * r.w);
        shifted[half] += (t.x * t.x + t.y * t.y) + (t.z * t.z + t.w * t.w);
        errors[half] += (e.x * e.x + e.y * e.y) + (e.z * e.z + e.w * e.w);
        largest[half] = fmaxf(largest[half],
                              fmaxf(fmaxf(fabsf(r.x), fabsf(r.y)), fmaxf(fabsf(r.z), fabsf(r.w))));
        operand[step][half] = *reinterpret_cast<const unsigned*>(&low);
        operand[step][2 + half] = *reinterpret_cast<const unsigned*>(&high);
      }
    }
    float threshold_terms[2], length[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = begin + group + 8 * half;
      const bool valid = row < search.rows;
      squares[half] = quad_sum(squares[half]);
      largest[half] = quad_max(largest[half]);
      // A sum of squares is NaN if one of them is.
      if (valid && !bad[half] && (isnan(squares[half]) || largest[half] == INFINITY)) {
        bad[half] = true;
        if (quad_lane == 0) atomicMin(search.first_bad, static_cast<unsigned long long>(row));
      }
      if (valid && level > 0 && quad_lane == 0) {
        search.norms[row * levels.count + level - 1] = squares[half];
      }
      // Cauchy-Schwarz on the rounding of the operands; then the sums of the tensor cores, which
      // truncate terms to 24 bits or more below the largest of a step. The factors cover the
      // rounding of the bound itself.
      const float norm = __uint_as_float(bounds.norm), error = __uint_as_float(bounds.error);
      const float t = sqrtf(quad_sum(shifted[half])) * kInflated + kFlushed;
      const float e = sqrtf(quad_sum(errors[half])) * kInflated + kFlushed + t * 0x1p-23f;
      float bound = e * (norm + error) + (t + e) * error;
      bound += (kWidth + 64) * 1.125f * 0x1p-22f * (t + norm) * norm;
      threshold_terms[half] = (bound + (kWidth + 8) * 0x1p-123f) * 1.001f;
      length[half] = t;
    }
    if (level == levels.count) break;

    const int size = levels.size[level], first_stage = levels.stage[level];
    const int last_stage = levels.stage[level + 1];
    // All ones from the highest bit of the last place of a lane down.
    const int mask = (1 << (32 - __clz((last_stage - first_stage) * kCodes / 4 - 1))) - 1;
    const auto screen = [&](auto visit) {
      for (int stage = first_stage; stage < last_stage; ++stage) {
        asm volatile("cp.async.wait_group 0;" ::: "memory");
        // The stage has arrived for all, and all are done with the one before it.
        __syncthreads();
        prefetch(stage + 1);
        const char* buffer = buffers + stage % 2 * kBytes;
        const auto* fragments = reinterpret_cast<const uint4*>(buffer) + lane;
        const auto* bias =
            reinterpret_cast<const float2*>(buffer + kCodes * 2 * kWidth) + quad_lane;
#pragma unroll
        for (int tile = 0; tile < kCodes / 8; tile += 2) {
          // Even and odd steps apart: four sums to add to, none of which waits for another.
          float even[2][4], odd[2][4] = {};
#pragma unroll
          for (int each = 0; each < 2; ++each) {
            const float2 start = bias[(tile + each) * 4];
            even[each][0] = even[each][2] = start.x;
            even[each][1] = even[each][3] = start.y;
          }
#pragma unroll
          for (int pair = 0; pair < kSteps / 2; ++pair) {
#pragma unroll
            for (int each = 0; each < 2; ++each) {
              const uint4 b = fragments[((tile + each) * (kSteps / 2) + pair) * 32];
              multiply(even[each], operand[2 * pair], b.x, b.y);
              multiply(odd[each], operand[2 * pair + 1], b.z, b.w);
            }
          }
#pragma unroll
          for (int each = 0; each < 2; ++each) {
            const int place = ((stage - first_stage) * (kCodes / 8) + tile + each) * 2;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              visit(i / 2, even[each][i] + odd[each][i], place + i % 2);
            }
          }
        }
      }
    };
    Best best[2];
    screen([&](int half, float score, int place) { best[half].add(score, place, mask); });
    float thresholds[2];
    bool listed[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float top = quad_max(best[half].first), bound = threshold_terms[half];
      const float tag = (mask + 3) * 0x1p-23f * (fabsf(top) + 2 * bound);
      float threshold = top - 2.001f * (bound + tag);
      // Beyond this, elements overflow: all codewords are candidates.
      thresholds[half] = length[half] < kLongest ? threshold : -INFINITY;
      const bool third = begin + group + 8 * half < search.rows && !bad[half] &&
                         length[half] < kLongest && !(best[half].third < threshold);
      listed[half] = quad_sum(int{third}) > 0;
    }
    // Few blocks have rows with many candidates, and then the level is screened once more.
    if (__syncthreads_or(listed[0] || listed[1])) {
      asm volatile("cp.async.wait_group 0;" ::: "memory");
      if (lane == 0) list->count = 0;
      __syncthreads();
      prefetch(first_stage);
      screen([&](int half, float score, int place) {
        if (listed[half] && !(score < thresholds[half])) {
          const int at = atomicAdd(&list->count, 1);
          const int entry = (group + 8 * half) << kCodeBits | code_at(place, quad_lane);
          if (at < kListed) list->entries[at] = entry;
        }
      });
      __syncwarp();
    }
    const float* book = work.books + int64_t{levels.first[level]} * kWidth;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = begin + group + 8 * half;
      const float threshold = thresholds[half];
      // Not "at least": scores may be NaN then.
      const bool reaches = !(best[half].first < threshold);
      const int found =
          reaches + !(best[half].second < threshold) + !(best[half].third < threshold);
      const bool unsure = row < search.rows && !bad[half] && quad_sum(found) != 1;
      int chosen = reaches ? code_at(__float_as_int(best[half].first) & mask, quad_lane) : 0;
      // Where one lane reaches the threshold, the others add nothing.
      chosen = quad_sum(chosen);
      for (unsigned left = __ballot_sync(kAll, unsure && quad_lane == 0); left; left &= left - 1) {
        const int leader = __ffs(left) - 1;
        // A list that had no room for all names none.
        const bool complete =
            __shfl_sync(kAll, int{listed[half]}, leader) && list->count <= kListed;
        const int decided =
            decide<kWidth>(rows, leader / 4 + 8 * half, best[half], threshold, leader, mask, book,
                           size, complete ? list : nullptr, lane);
        if (group == leader / 4) chosen = decided;
      }
      code[half] = row < search.rows && !bad[half] ? chosen : 0;
      if (row < search.rows && quad_lane == 0) {
        search.codes[row * levels.count + level] = code[half];
      }
    }
    __syncwarp();
  }

  if (search.residual != nullptr) {
    __syncwarp();
    for (int at = lane; at < kWarpRows * kWidth; at += 32) {
      const int row = at / kWidth, dim = at % kWidth;
      if (begin + row < search.rows && dim < search.width) {
        const float* four = &quarter<kWidth>(rows, row, dim / 4).x;
        search.residual[(begin + row) * search.width + dim] = four[dim % 4];
      }
    }
  }
}

constexpr int64_t aligned(int64_t bytes) { return (bytes + 255) / 256 * 256; }

template <int kWidth>
Levels lay_out(const int64_t* sizes, int64_t levels) {
  Levels table{static_cast<int>(levels), {}, {}, {}};
  int first = 0;
  for (int level = 0; level < table.count; ++level) {
    table.size[level] = static_cast<int>(sizes[level]);
    table.first[level] = first;
    first += table.size[level];
    constexpr int kCodes = kStage<kWidth>;
    table.stage[level + 1] = table.stage[level] + (table.size[level] + kCodes - 1) / kCodes;
  }
  return table;
}

// Places the parts of the workspace behind one another; returns its bytes.
template <int kWidth>
int64_t place_parts(const Levels& levels, char* base, Workspace* work) {
  const int64_t total = levels.first[levels.count - 1] + levels.size[levels.count - 1];
  int64_t end = 0;
  const auto part = [&](int64_t bytes) {
    char* at = base + end;
    end += aligned(bytes);
    return at;
  };
  work->books = reinterpret_cast<float*>(part(total * kWidth * 4));
  work->centers = reinterpret_cast<float*>(part(int64_t{levels.count} * kWidth * 4));
  work->stages = part(int64_t{levels.stage[levels.count]} * kStageBytes<kWidth>);
  work->bounds = reinterpret_cast<LevelBounds*>(
      part(levels.count * static_cast<int64_t>(sizeof(LevelBounds))));
  work->hashes = reinterpret_cast<unsigned long long*>(part(total * 8));
  return end;
}

// Packs the codebooks and searches them.
template <int kWidth>
void run(Search search, const float* codebooks, void* workspace, cudaStream_t stream) {
  const Levels& levels = search.levels;
  place_parts<kWidth>(levels, static_cast<char*>(workspace), &search.work);
  const int total = levels.first[levels.count - 1] + levels.size[levels.count - 1];
  const int padded = levels.stage[levels.count] * kStage<kWidth>;
  clear_bounds<<<1, kMaxLevels, 0, stream>>>(search.work.bounds, levels.count);
  find_centers<<<dim3(kWidth / 32, levels.count), 256, 0, stream>>>(codebooks, levels, search.width,
                                                                    kWidth, search.work.centers);
  copy_codewords<<<(total + 7) / 8, 256, 0, stream>>>(codebooks, levels, total, search.width,
                                                      kWidth, search.work, search.first_bad);
  pack_operands<kWidth><<<(padded + 7) / 8, 256, 0, stream>>>(levels, search.work);

  check_launch("residual_quantize");
  if (search.rows == 0) return;

  int device = 0, room = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&room, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const auto bytes = [](int warps) {
    const int rows = kWarpRows * kWidth * static_cast<int>(sizeof(float));
    return warps * (rows + static_cast<int>(sizeof(List))) + 2 * kStageBytes<kWidth>;
  };
  int warps = kMaxWarps;
  while (warps > 1 && bytes(warps) > room) --warps;
  cudaFuncSetAttribute(search_kernel<kWidth>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                       bytes(warps));
  ++search.first_bad;
  const int64_t block_rows = int64_t{warps} * kWarpRows;
  const auto blocks = static_cast<unsigned>((search.rows + block_rows - 1) / block_rows);
  search_kernel<kWidth><<<blocks, 32 * warps, bytes(warps), stream>>>(search);
  check_launch("residual_quantize");
}

template <int kWidth>
int64_t workspace_bytes(const int64_t* sizes, int64_t levels) {
  Workspace work{};
  return place_parts<kWidth>(lay_out<kWidth>(sizes, levels), nullptr, &work);
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
  return with_width(width, [&](auto built) { return workspace_bytes<built>(sizes, levels); });
}

void residual_quantize(const void* x, RowType type, int64_t rows, int64_t width,
                       const float* codebooks, const int64_t* sizes, int64_t levels,
                       void* workspace, int32_t* codes, float* norms, float* residual,
                       int64_t* first_bad, void* stream) {
  with_width(width, [&](auto built) {
    Search search{x,
                  type,
                  rows,
                  static_cast<int>(width),
                  lay_out<built>(sizes, levels),
                  {},
                  codes,
                  norms,
                  residual,
                  reinterpret_cast<unsigned long long*>(first_bad)};
    run<built>(search, codebooks, workspace, static_cast<cudaStream_t>(stream));
    return 0;
  });
}

}  // namespace plum::cuda
