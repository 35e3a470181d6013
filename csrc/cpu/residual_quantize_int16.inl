// The variants that screen in int16: rows and codewords as numbers of steps, whose products have
// exact sums.

namespace plum::cpu::PLUM_ISA {
namespace {

using residual::kRowUnit;
using residual::Level;
using residual::Problem;
using residual::Row;

#include "simd.inl"

constexpr bool kPairs = true, kIntegers = true;

typedef int32_t Sum __attribute__((vector_size(sizeof(Vec))));

#if defined(__AVX512VNNI__)
inline Bits rounded(Vec a) { return _mm512_cvtps_epi32(a); }
inline Vec as_floats(Bits a) { return _mm512_cvtepi32_ps(a); }
// The low halves of a and of b.
inline Vec pairs(Bits a, Bits b) {
  return _mm512_castsi512_ps(_mm512_mask_blend_epi16(0xaaaaaaaa, a, _mm512_slli_epi32(b, 16)));
}
inline Sum multiply_add(Vec a, Vec b, Sum sum) {
  return reinterpret_cast<Sum>(_mm512_dpwssd_epi32(reinterpret_cast<Bits>(sum),
                                                   _mm512_castps_si512(a), _mm512_castps_si512(b)));
}
#else
inline Bits rounded(Vec a) { return _mm256_cvtps_epi32(a); }
inline Vec as_floats(Bits a) { return _mm256_cvtepi32_ps(a); }
inline Vec pairs(Bits a, Bits b) {
  return _mm256_castsi256_ps(_mm256_blend_epi16(a, _mm256_slli_epi32(b, 16), 0xaa));
}
inline Sum multiply_add(Vec a, Vec b, Sum sum) {
  return sum +
         reinterpret_cast<Sum>(_mm256_madd_epi16(_mm256_castps_si256(a), _mm256_castps_si256(b)));
}
#endif

// Stores x and y as numbers of steps and leaves their rounding errors in them. Dimension d of x and
// of y make a pair: a 32-bit element with y in its high half.
inline void store_operand(Vec& x, Vec& y, float step, float* operand) {
  const Vec per_step = broadcast(1 / step), back = broadcast(-step);
  const Bits a = rounded(x * per_step), b = rounded(y * per_step);
  store(operand, pairs(a, b));
  x = fma(as_floats(a), back, x);
  y = fma(as_floats(b), back, y);
}

inline Sum first_sum(Vec) { return Sum{}; }
// One step after the other: their product may be too small for a float.
inline Vec score_of(Sum sum, Vec bias, float row_step, float step) {
  const Vec product = as_floats(reinterpret_cast<Bits>(sum)) * broadcast(row_step);
  return fma(product, broadcast(step), bias);
}

#include "residual_quantize_dot.inl"
#include "residual_quantize_kernel.inl"

}  // namespace

int64_t residual_quantize_block(const Problem& problem, int64_t begin, int64_t count, int64_t next,
                                float* workspace) {
  return quantize_block(problem, begin, count, next, workspace);
}

}  // namespace plum::cpu::PLUM_ISA
