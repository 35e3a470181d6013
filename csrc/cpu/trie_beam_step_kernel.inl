// The vector parts of trie_beam_step, compiled once per instruction set inside the namespace
// PLUM_ISA; the compiler may fuse no products and sums but those of fused().

namespace plum::cpu::PLUM_ISA {

#include "simd.inl"

// Sums are kept in this many lanes whatever the width of a vector, taken up to fp64 every kChain
// values: at most kChain / kLanes + 5 roundings of fp32 stand behind a term.
constexpr int64_t kUnit = 16, kLanes = 64, kChain = 1024;

// 2^(i/16), less i * 2^19: with n * 2^19 added as integers it is 2^(n/16) for any n = i mod 16.
#define PLUM_POWER(i, bits) static_cast<int32_t>(bits - (i << 19))
alignas(64) constexpr int32_t kPowers[16] = {
    PLUM_POWER(0, 0x3f800000),  PLUM_POWER(1, 0x3f85aac3),  PLUM_POWER(2, 0x3f8b95c2),
    PLUM_POWER(3, 0x3f91c3d3),  PLUM_POWER(4, 0x3f9837f0),  PLUM_POWER(5, 0x3f9ef532),
    PLUM_POWER(6, 0x3fa5fed7),  PLUM_POWER(7, 0x3fad583f),  PLUM_POWER(8, 0x3fb504f3),
    PLUM_POWER(9, 0x3fbd08a4),  PLUM_POWER(10, 0x3fc5672a), PLUM_POWER(11, 0x3fce248c),
    PLUM_POWER(12, 0x3fd744fd), PLUM_POWER(13, 0x3fe0ccdf), PLUM_POWER(14, 0x3feac0c7),
    PLUM_POWER(15, 0x3ff5257d)};
#undef PLUM_POWER

// kPowers[n mod 16] + n * 2^19, n in the low bits of each lane.
#if defined(__AVX512F__)
inline Vec power(Vec n) {
  const Bits bits = _mm512_castps_si512(n);
  const Bits entry = _mm512_permutexvar_epi32(bits, _mm512_load_si512(kPowers));
  return _mm512_castsi512_ps(_mm512_add_epi32(entry, _mm512_slli_epi32(bits, 19)));
}
#elif defined(__AVX2__)
inline Vec power(Vec n) {
  const Bits bits = _mm256_castps_si256(n);
  const auto half = [&](int i) {
    const Vec table = load(reinterpret_cast<const float*>(kPowers) + i);
    return _mm256_permutevar8x32_ps(table, bits);
  };
  // Bit 3 of n, moved to the sign, chooses the half of the table.
  const Vec upper = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 28));
  const Bits entry = _mm256_castps_si256(_mm256_blendv_ps(half(0), half(8), upper));
  return _mm256_castsi256_ps(_mm256_add_epi32(entry, _mm256_slli_epi32(bits, 19)));
}
#else
inline Vec power(Vec n) {
  // Without a sign, for the bits of a NaN overflow.
  typedef uint32_t Words __attribute__((vector_size(16)));
  const Words bits = reinterpret_cast<Words>(n), i = bits & 15;
  const Bits entry = {kPowers[i[0]], kPowers[i[1]], kPowers[i[2]], kPowers[i[3]]};
  return reinterpret_cast<Vec>(reinterpret_cast<Words>(entry) + (bits << 19));
}
#endif

// a * b + c, rounded once whatever the instruction set.
#if defined(__AVX2__)
inline Vec fused(Vec a, Vec b, Vec c) { return fma(a, b, c); }
#else
inline Vec fused(Vec a, Vec b, Vec c) {
  return Vec{__builtin_fmaf(a[0], b[0], c[0]), __builtin_fmaf(a[1], b[1], c[1]),
             __builtin_fmaf(a[2], b[2], c[2]), __builtin_fmaf(a[3], b[3], c[3])};
}
#endif

// exp(a) for a <= 0 with relative error below 5.3e-7 + 1.3e-8 |a|, at least 2^-126; NaN for NaN.
// 2^(t/16) with t = n + f, |f| <= 1/2: a table for 2^(n/16) and a parabola for 2^(f/16) - 1, its
// slope raised by H^2 / 8, H = log(2) / 32, which makes the error of the cubic term smallest.
inline Vec exponential(Vec a) {
  constexpr float kStep = 0x1.62e43p-5f;  // log(2) / 16
  const Vec per_step = broadcast(0x1.715476p+4f), whole_number = broadcast(0x1.8p23f);
  a = larger(broadcast(-87.33654f), a);
  const Vec n = fused(a, per_step, whole_number);
  const Vec f = fused(a, per_step, whole_number - n);
  const Vec slope = fused(f, broadcast(kStep * kStep / 2),
                          broadcast(static_cast<float>(kStep * (1 + kStep * kStep / 32))));
  const Vec whole = power(n);
  return fused(whole, slope * f, whole);
}

// Largest of x[0..count); any value if there is a NaN among them.
float largest_of(const float* x, int64_t count) {
  int64_t i = 0;
  float top = x[0];
  if (count >= 4 * kWidth) {
    Vec best[4] = {load(x), load(x + kWidth), load(x + 2 * kWidth), load(x + 3 * kWidth)};
    for (i = 4 * kWidth; i + 4 * kWidth <= count; i += 4 * kWidth) {
      for (int j = 0; j < 4; ++j) best[j] = larger(best[j], load(x + i + j * kWidth));
    }
    top = largest(larger(larger(best[0], best[1]), larger(best[2], best[3])));
  }
  for (; i < count; ++i) top = top > x[i] ? top : x[i];
  return top;
}

// Sum of exp(x - top) over x[0..count), top the largest. Lane i mod 64 takes value i of a chain;
// the last chain is padded to a multiple of 16 with values that add 2^-126 at most. Meanwhile as
// many bytes from `next` on, what is read afterwards, come into the cache.
double sum_of_exponentials(const float* x, int64_t count, float top, const void* next) {
  constexpr int kVecs = kUnit / kWidth;
  const Vec shift = broadcast(top);
  double total = 0;
  for (int64_t begin = 0; begin < count; begin += kChain) {
    const int64_t end = begin + kChain < count ? begin + kChain : count;
    Vec sums[4 * kVecs];
    for (Vec& sum : sums) sum = broadcast(0);
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      for (int j = 0; j < 4; ++j) {
        __builtin_prefetch(static_cast<const char*>(next) + (i + j * kUnit) * sizeof(float));
      }
      for (int j = 0; j < 4 * kVecs; ++j)
        sums[j] = sums[j] + exponential(load(x + i + j * kWidth) - shift);
    }
    for (int unit = 0; i < end; i += kUnit, ++unit) {
      alignas(64) float padded[kUnit];
      const float* values = x + i;
      if (end - i < kUnit) {
        for (int64_t j = 0; j < kUnit; ++j) padded[j] = j < end - i ? x[i + j] : -__builtin_inff();
        values = padded;
      }
      for (int j = 0; j < kVecs; ++j) {
        Vec& sum = sums[unit * kVecs + j];
        sum = sum + exponential(load(values + j * kWidth) - shift);
      }
    }
    alignas(64) float lanes[kUnit];
    for (int j = 0; j < kVecs; ++j) {
      const Vec half = sums[j] + sums[kVecs + j], other = sums[2 * kVecs + j] + sums[3 * kVecs + j];
      store(lanes + j * kWidth, half + other);
    }
    for (int half = kUnit / 2; half > 0; half /= 2) {
      for (int j = 0; j < half; ++j) lanes[j] += lanes[j + half];
    }
    total += lanes[0];
  }
  return total;
}

// Writes the positions i, rising, where base + ((x[i] - top) - log_sum) > threshold and, unless
// `bits` is null, the bit is set; returns how many. `hits` has room for `count` and a vector more.
int64_t find_above(const float* x, int64_t count, const uint64_t* bits, float top, float log_sum,
                   float base, float threshold, int32_t* hits) {
  const auto score_of = [=](auto value, auto same) {
    return same(base) + ((value - same(top)) - same(log_sum));
  };
  int64_t found = 0, i = 0;
#if defined(__AVX512F__) || defined(__AVX2__)
  for (; i + kWidth <= count; i += kWidth) {
    const Vec score = score_of(load(x + i), broadcast);
#if defined(__AVX512F__)
    __mmask16 above = _mm512_cmp_ps_mask(score, broadcast(threshold), _CMP_GT_OQ);
    if (!above) continue;
    if (bits != nullptr) above &= static_cast<__mmask16>(bits[i / 64] >> (i % 64));
    const Bits position =
        _mm512_add_epi32(same_bits(static_cast<int32_t>(i)),
                         _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    _mm512_storeu_si512(hits + found, _mm512_maskz_compress_epi32(above, position));
    found += __builtin_popcount(above);
#else
    uint32_t above = _mm256_movemask_ps(_mm256_cmp_ps(score, broadcast(threshold), _CMP_GT_OQ));
    if (bits != nullptr) above &= static_cast<uint32_t>(bits[i / 64] >> (i % 64));
    for (; above; above &= above - 1) {
      hits[found++] = static_cast<int32_t>(i) + __builtin_ctz(above);
    }
#endif
  }
#endif
  for (; i < count; ++i) {
    hits[found] = static_cast<int32_t>(i);
    const bool set = bits == nullptr || bits[i / 64] >> (i % 64) & 1;
    found += set && score_of(x[i], [](float value) { return value; }) > threshold;
  }
  return found;
}

// Copies x[0..count), -inf where the bit is not set.
void masked(const float* x, int64_t count, const uint64_t* bits, float* out) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + kWidth <= count; i += kWidth) {
    const auto set = static_cast<__mmask16>(bits[i / 64] >> (i % 64));
    store(out + i, _mm512_mask_mov_ps(broadcast(-__builtin_inff()), set, load(x + i)));
  }
#elif defined(__AVX2__)
  const Bits lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  for (; i + kWidth <= count; i += kWidth) {
    const Bits word = same_bits(static_cast<int32_t>(bits[i / 64] >> (i % 64) & 0xff));
    const Bits set = _mm256_cmpeq_epi32(_mm256_and_si256(word, lane), lane);
    store(out + i,
          _mm256_blendv_ps(broadcast(-__builtin_inff()), load(x + i), _mm256_castsi256_ps(set)));
  }
#endif
  for (; i < count; ++i) out[i] = bits[i / 64] >> (i % 64) & 1 ? x[i] : -__builtin_inff();
}

void widen_bf16(const uint16_t* row, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = from_bits(uint32_t{row[i]} << 16);
}

void widen_fp16(const uint16_t* row, int64_t count, float* out) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + kWidth <= count; i += kWidth) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + i));
    store(out + i, _mm512_cvtph_ps(half));
  }
#elif defined(__AVX2__)
  for (; i + kWidth <= count; i += kWidth) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + i));
    store(out + i, _mm256_cvtph_ps(half));
  }
#endif
  for (; i < count; ++i) out[i] = from_half(row[i]);
}

// Sorts up to 256 keys, none of them 0, the largest first, by counting what is above each. States
// that are no nodes of the level have children of one code, and these equal keys.
void sort_few(const uint64_t* keys, int64_t count, uint64_t* sorted) {
  for (int64_t i = 0; i < count; ++i) sorted[i] = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint64_t above = 0;
    for (int64_t j = 0; j < count; ++j) above += keys[j] > keys[i];
    while (sorted[above] == keys[i]) ++above;
    sorted[above] = keys[i];
  }
}

const beam::Kernels kBeamKernels{largest_of, sum_of_exponentials, find_above, masked,
                                 widen_bf16, widen_fp16,          sort_few};

const beam::Kernels& beam_kernels() { return kBeamKernels; }

}  // namespace plum::cpu::PLUM_ISA
