// Exact nearest codeword of a row's residual, level by level, as a warp does it for 16 rows.
//
// With t = r - center and c' = c - center, the nearest codeword has the largest score
// t.c' - |c'|^2/2. A screen on tensor cores (fp16 products, fp32 sums) keeps the three best scores
// of each lane; what its error bound cannot tell apart is compared by fp64 distances, what those
// cannot tell apart by fp64 distances summed in the order of the dimensions, ties to the lowest
// code. Residuals stay in shared memory, the operand of the screen in registers.
#pragma once

#include <climits>
#include <cstdint>
#include <type_traits>

#include "common.cuh"
#include "pack_codebooks.cuh"
#include "plum/residual_quantize.h"

namespace plum::cuda {
namespace {

using cpu::RowType;

constexpr int kWarpRows = 16;
// Norm of a scaled row up to which no element overflows in fp16.
constexpr float kLongest = 60000.f;
// Candidates that a warp lists of the rows of which three or more are in one lane.
constexpr int kListed = 160;

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

__device__ __forceinline__ float widen(RowType type, unsigned short bits) {
  return type == RowType::kFloat16 ? __half2float(__ushort_as_half(bits))
                                   : __uint_as_float(unsigned{bits} << 16);
}

// Four dimensions of a row, those beyond its width zero.
__device__ __forceinline__ float4 load_four(const Search& search, int64_t row, int four) {
  const int64_t first = row * search.width + four * 4;
  float values[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[i] = 0;
    if (four * 4 + i < search.width) {
      values[i] = search.type == RowType::kFloat32
                      ? static_cast<const float*>(search.x)[first + i]
                      : widen(search.type, static_cast<const unsigned short*>(search.x)[first + i]);
    }
  }
  return make_float4(values[0], values[1], values[2], values[3]);
}

// The same of 16-bit rows of kWidth dimensions, aligned to 8 bytes.
template <int kWidth>
__device__ __forceinline__ float4 load_four_halves(const Search& search, int64_t row, int four) {
  const uint2 both = __ldcs(static_cast<const uint2*>(search.x) + row * (kWidth / 4) + four);
  return make_float4(widen(search.type, both.x & 0xffff), widen(search.type, both.x >> 16),
                     widen(search.type, both.y & 0xffff), widen(search.type, both.y >> 16));
}

// Where a warp keeps four dimensions of one of its rows: the lanes that read two rows together
// take different banks.
template <int kWidth>
__device__ __forceinline__ float4& quarter(float* rows, int row, int four) {
  return reinterpret_cast<float4*>(rows + row * kWidth)[four ^ (row % 2 * 4)];
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

__device__ __forceinline__ void add_squares(float& sum, const float4& values) {
  sum = fmaf(values.x, values.x, sum);
  sum = fmaf(values.y, values.y, sum);
  sum = fmaf(values.z, values.z, sum);
  sum = fmaf(values.w, values.w, sum);
}

__device__ __forceinline__ float quad_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(kAll, value, 1));
  return fmaxf(value, __shfl_xor_sync(kAll, value, 2));
}

// Codes of a lane are two in eight.
__device__ __forceinline__ int code_at(int place, int quad_lane) {
  return place / 2 * 8 + quad_lane * 2 + place % 2;
}

// The squared distances of a row and two codewords by the whole warp; their relative error is below
// (kWidth + 32) 2^-52.
template <int kWidth>
__device__ void distances(float* rows, int row, const float* const (&codewords)[2], int lane,
                          double (&sums)[2]) {
  sums[0] = sums[1] = 0;
#pragma unroll
  for (int four = lane; four < kWidth / 4; four += 32) {
    const float4 r = quarter<kWidth>(rows, row, four);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float4 c = __ldg(reinterpret_cast<const float4*>(codewords[i]) + four);
      const double x = double{r.x} - c.x, y = double{r.y} - c.y;
      const double z = double{r.z} - c.z, w = double{r.w} - c.w;
      sums[i] += (x * x + y * y) + (z * z + w * w);
    }
  }
  for (double& sum : sums) sum = warp_sum(sum);
}

// A squared distance summed in the order of the dimensions and without fused operations.
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

// The least distance of those that a lane, then the warp has seen, its code, and the next distance.
struct Nearest {
  double least = INFINITY, next = INFINITY;
  int code = INT_MAX;

  __device__ __forceinline__ void add(const Nearest& other) {
    next = fmin(fmin(next, other.next), fmax(least, other.least));
    if (other.least < least || (other.least == least && other.code < code)) code = other.code;
    least = fmin(least, other.least);
  }
  __device__ __forceinline__ void add_lanes() {
    for (int step = 16; step; step /= 2) {
      Nearest other;
      other.least = __shfl_xor_sync(kAll, least, step);
      other.next = __shfl_xor_sync(kAll, next, step);
      other.code = __shfl_xor_sync(kAll, code, step);
      add(other);
    }
  }
};

// The exact nearest codeword of one of the warp's rows. Its candidates are listed, or those of the
// best scores of the four lanes from `leader` on that reach the threshold, or all codewords where a
// third does. Called by the whole warp, a lane of which takes every 32nd candidate.
template <int kWidth>
__device__ int decide(float* rows, int row, const Best& best, float threshold, int leader, int mask,
                      const float* __restrict__ book, int size, const List* list, int lane) {
  constexpr double kSlack = 1 + (kWidth + 32) * 0x1p-50;
  threshold = __shfl_sync(kAll, threshold, leader);
  const int source = leader + lane / 2 % 4;
  const float first = __shfl_sync(kAll, best.first, source);
  const float second = __shfl_sync(kAll, best.second, source);
  const float third = __shfl_sync(kAll, best.third, source);
  const bool whole = __any_sync(kAll, !(third < threshold));
  const int count = list != nullptr ? list->count : whole ? size : 8;
  const auto candidate = [&](int at) {
    if (at >= count) return -1;
    if (list != nullptr) {
      const int entry = list->entries[at];
      return entry >> kCodeBits == row ? entry & ((1 << kCodeBits) - 1) : -1;
    }
    if (whole) return at;
    const float score = at % 2 ? second : first;
    return score < threshold ? -1 : code_at(__float_as_int(score) & mask, at / 2);
  };
  const auto codeword = [&](int code) { return book + int64_t{code} * kWidth; };
  // The distances of the lanes' candidates, one after another.
  const auto measure = [&](int code) {
    double own = INFINITY;
    for (unsigned left = __ballot_sync(kAll, code >= 0); left != 0; left &= left - 1) {
      const int a = __ffs(left) - 1;
      if (left & (left - 1)) left &= left - 1;
      const int b = __ffs(left) - 1;
      const int code_a = __shfl_sync(kAll, code, a), code_b = __shfl_sync(kAll, code, b);
      double found[2];
      distances<kWidth>(rows, row, {codeword(code_a), codeword(code_b)}, lane, found);
      if (lane == a) own = found[0];
      if (lane == b) own = found[1];
    }
    return own;
  };
  Nearest nearest;
  double own = INFINITY;
  for (int begin = 0; begin < count; begin += 32) {
    const int code = candidate(begin + lane);
    own = measure(code);
    if (code >= 0) nearest.add({own, INFINITY, code});
  }
  nearest.add_lanes();
  if (!(nearest.next > nearest.least * kSlack)) {
    const double limit = nearest.least * kSlack;
    nearest = Nearest{};
    for (int begin = 0; begin < count; begin += 32) {
      const int code = candidate(begin + lane);
      if (count > 32) own = measure(code);
      if (code >= 0 && own <= limit) {
        nearest.add({ordered_distance<kWidth>(rows, row, codeword(code)), INFINITY, code});
      }
    }
    nearest.add_lanes();
  }
  // With codewords that are not finite, none is nearest.
  return nearest.code < size ? nearest.code : 0;
}

// The exact search of the 16 rows of a warp. What differs between the kernels is `Screen`:
//   Tiles            how codewords are packed
//   rows, list       the warp's place in shared memory: [16, kWidth], and candidates
//   begin            the warp's first row
//   start()          called when the warp has asked for its rows
//   wait_for_rows()  returns when they are there
//   run(level, operand, visit)  calls visit(half, score, place) for all codewords of a level and
//                    the lane's rows, lane / 4 and 8 behind it: half 0 and 1
//   any(value)       whether a warp of the block has it true
//   rewind(level)    called by all warps that a level is to be run once more
template <int kWidth, typename Screen>
__device__ __forceinline__ void search_rows(const Search& search, Screen& screen) {
  using Tiles = typename Screen::Tiles;
  constexpr int kSteps = kWidth / 16;
  // Steps whose codewords are asked for together.
  constexpr int kAhead = kSteps < 4 ? kSteps : 4;
  // The largest relative error of a sum of squares, and what flushed denormals hide.
  constexpr float kInflated = 1 + (kWidth + 32) * 0x1p-23f, kFlushed = 0x1p-57f;
  const int lane = threadIdx.x % 32, group = lane / 4, quad_lane = lane % 4;
  const Levels& levels = search.levels;
  const Workspace& work = search.work;
  const int64_t begin = screen.begin;
  float* rows = screen.rows;
  List* list = screen.list;

  const auto read_rows = [&](auto read_four) {
#pragma unroll 8
    for (int at = lane; at < kWarpRows * kWidth / 4; at += 32) {
      const int row = at / (kWidth / 4), four = at % (kWidth / 4);
      float4& kept = quarter<kWidth>(rows, row, four);
      if (begin + row < search.rows) {
        read_four(kept, begin + row, four);
      } else {
        kept = make_float4(0, 0, 0, 0);
      }
    }
  };
  if (search.width != kWidth || reinterpret_cast<uintptr_t>(search.x) % 16 != 0) {
    read_rows([&](float4& kept, int64_t row, int four) { kept = load_four(search, row, four); });
  } else if (search.type == RowType::kFloat32) {
    read_rows([&](float4& kept, int64_t row, int four) {
      copy_async(&kept, static_cast<const float4*>(search.x) + row * (kWidth / 4) + four);
    });
  } else {
    read_rows([&](float4& kept, int64_t row, int four) {
      kept = load_four_halves<kWidth>(search, row, four);
    });
  }
  end_group();
  screen.start();
  screen.wait_for_rows();
  __syncwarp();

  int code[2] = {0, 0};
  bool bad[2] = {false, false};
  for (int level = 0; level <= levels.count; ++level) {
    const int here = min(level, levels.count - 1), before = max(level - 1, 0);
    const LevelBounds bounds = work.bounds[here];
    const float* shifts = work.shifts + here * kWidth;
    const float* books = work.books + int64_t{levels.first[before]} * kWidth;
    float squares[2] = {0, 0}, shifted[2] = {0, 0}, errors[2] = {0, 0};
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
      const float4 shift = __ldg(reinterpret_cast<const float4*>(shifts) + four);
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
            make_float4(fmaf(r.x, bounds.scale, shift.x), fmaf(r.y, bounds.scale, shift.y),
                        fmaf(r.z, bounds.scale, shift.z), fmaf(r.w, bounds.scale, shift.w));
        const __half2 low = __floats2half2_rn(t.x, t.y), high = __floats2half2_rn(t.z, t.w);
        const float2 a = __half22float2(low), b = __half22float2(high);
        add_squares(squares[half], r);
        add_squares(shifted[half], t);
        add_squares(errors[half], make_float4(t.x - a.x, t.y - a.y, t.z - b.x, t.w - b.y));
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
      // A sum of squares is NaN if one of them is; it may be infinite though none is.
      bool broken = isnan(squares[half]);
      if (__any_sync(kAll, squares[half] == INFINITY)) {
        float largest = 0;
        for (int step = 0; step < kSteps; ++step) {
          const float4 r = quarter<kWidth>(rows, group + 8 * half, step * 4 + quad_lane);
          largest =
              fmaxf(fmaxf(largest, fmaxf(fabsf(r.x), fabsf(r.y))), fmaxf(fabsf(r.z), fabsf(r.w)));
        }
        broken |= quad_max(largest) == INFINITY;
      }
      if (valid && !bad[half] && broken) {
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

    const int size = levels.size[level];
    // All ones from the highest bit of the last place of a lane down.
    const int places = (levels.stage[level + 1] - levels.stage[level]) * Tiles::kCodes / 4;
    const int mask = (1 << (32 - __clz(places - 1))) - 1;
    Best best[2];
    screen.run(level, operand,
               [&](int half, float score, int place) { best[half].add(score, place, mask); });
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
    if (screen.any(listed[0] || listed[1])) {
      if (lane == 0) list->count = 0;
      screen.rewind(level);
      screen.run(level, operand, [&](int half, float score, int place) {
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
      // The shuffles are for all lanes, whatever their rows.
      const int found_in_all = quad_sum(found);
      const bool unsure = row < search.rows && !bad[half] && found_in_all != 1;
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

inline int shared_memory_of_a_block() {
  int device = 0, bytes = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes;
}

// What `launch_search` takes; see plum::cuda::residual_quantize.
template <typename Tiles>
Search make_search(const void* x, RowType type, int64_t rows, int64_t width, const int64_t* sizes,
                   int64_t levels, int32_t* codes, float* norms, float* residual,
                   int64_t* first_bad) {
  return {x,
          type,
          rows,
          static_cast<int>(width),
          lay_out<Tiles>(sizes, levels),
          {},
          codes,
          norms,
          residual,
          reinterpret_cast<unsigned long long*>(first_bad)};
}

// Packs the codebooks and launches `kernel`, of blocks of `warps` that search and `others`.
template <int kWidth, typename Tiles>
void launch_search(Search search, void (*kernel)(Search), int warps, int others, int shared_bytes,
                   const float* codebooks, void* workspace, cudaStream_t stream) {
  const Levels& levels = search.levels;
  place_parts<kWidth, Tiles>(levels, static_cast<char*>(workspace), &search.work);
  pack<kWidth, Tiles>(codebooks, levels, search.width, search.work, search.first_bad, stream);
  check_launch("residual_quantize");
  if (search.rows == 0) return;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  ++search.first_bad;
  const int64_t block_rows = int64_t{warps} * kWarpRows;
  const auto blocks = static_cast<unsigned>((search.rows + block_rows - 1) / block_rows);
  launch(kernel, blocks, 32 * (warps + others), shared_bytes, stream, search);
  check_launch("residual_quantize");
}

template <int kWidth, typename Tiles>
int64_t workspace_bytes(const int64_t* sizes, int64_t levels) {
  Workspace work{};
  return place_parts<kWidth, Tiles>(lay_out<Tiles>(sizes, levels), nullptr, &work);
}

}  // namespace
}  // namespace plum::cuda
