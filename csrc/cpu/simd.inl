// Vectors of floats of the width that the including file is compiled for. Included inside its
// ISA namespace, after <immintrin.h> where there is one.

#if defined(__AVX512F__)
using Vec = __m512;
using Bits = __m512i;
inline Vec broadcast(float a) { return _mm512_set1_ps(a); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec larger(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec smaller(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline float sum(Vec a) { return _mm512_reduce_add_ps(a); }
inline float largest(Vec a) { return _mm512_reduce_max_ps(a); }
// Bit i: a[i] >= b.
inline uint32_t at_least(Vec a, float b) { return _mm512_cmp_ps_mask(a, broadcast(b), _CMP_GE_OQ); }
inline Bits same_bits(int32_t a) { return _mm512_set1_epi32(a); }
// (a & keep) | tag
inline Vec tagged(Vec a, Bits keep, Bits tag) {
  return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(a), keep, tag, 0xEA));
}
#elif defined(__AVX2__)
using Vec = __m256;
using Bits = __m256i;
inline Vec broadcast(float a) { return _mm256_set1_ps(a); }
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec larger(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec smaller(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline uint32_t at_least(Vec a, float b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a, broadcast(b), _CMP_GE_OQ));
}
inline Bits same_bits(int32_t a) { return _mm256_set1_epi32(a); }
inline Vec tagged(Vec a, Bits keep, Bits tag) {
  return _mm256_or_ps(_mm256_and_ps(a, _mm256_castsi256_ps(keep)), _mm256_castsi256_ps(tag));
}
#else
typedef float Vec __attribute__((vector_size(16)));
typedef int32_t Bits __attribute__((vector_size(16)));
inline Vec broadcast(float a) { return Vec{a, a, a, a}; }
inline Vec load(const float* p) {
  Vec a;
  __builtin_memcpy(&a, p, sizeof a);
  return a;
}
inline void store(float* p, Vec a) { __builtin_memcpy(p, &a, sizeof a); }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }
inline Vec smaller(Vec a, Vec b) { return a < b ? a : b; }
inline uint32_t at_least(Vec a, float b) {
  return (a[0] >= b) | (a[1] >= b) << 1 | (a[2] >= b) << 2 | (a[3] >= b) << 3;
}
inline Bits same_bits(int32_t a) { return Bits{a, a, a, a}; }
inline Vec tagged(Vec a, Bits keep, Bits tag) {
  return reinterpret_cast<Vec>((reinterpret_cast<Bits>(a) & keep) | tag);
}
#endif

constexpr int kWidth = sizeof(Vec) / sizeof(float);

inline int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }

#if !defined(__AVX512F__)
inline float sum(Vec a) {
  float total = 0;
  for (int i = 0; i < kWidth; ++i) total += a[i];
  return total;
}
inline float largest(Vec a) {
  float top = a[0];
  for (int i = 1; i < kWidth; ++i) top = a[i] > top ? a[i] : top;
  return top;
}
#endif

// Keeps the best and the second best score of each lane.
inline void fold(Vec score, Vec& best, Vec& second) {
  second = larger(second, smaller(best, score));
  best = larger(best, score);
}

inline float from_bits(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Exact, and without denormal floats, which the process may flush to zero.
inline float from_half(uint16_t half) {
  const uint32_t magnitude = half & 0x7fffu, bits = magnitude << 13;
  const uint32_t denormal = to_bits(from_bits(bits + 0x38800000u) - 0x1p-14f);
  const uint32_t bias = magnitude < 0x7c00u ? 112u << 23 : 224u << 23;
  return from_bits((magnitude < 0x400u ? denormal : bits + bias) | (half & 0x8000u) << 16);
}
