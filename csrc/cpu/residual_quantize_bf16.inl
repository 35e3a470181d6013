// What the variants that screen in bf16 share: rounding of rows to pairs of bf16.

using residual::kRowUnit;
using residual::Level;
using residual::Problem;

#include "simd.inl"

constexpr bool kPairs = true;

// Stores x and y, 32 dimensions, and leaves their rounding errors in them.
inline void store_operand(Vec& x, Vec& y, float* operand) {
  const __m512i rounded = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(y, x));
  _mm512_storeu_si512(operand, rounded);
  const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(rounded));
  const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(rounded, 1));
  x -= _mm512_castsi512_ps(_mm512_slli_epi32(low, 16));
  y -= _mm512_castsi512_ps(_mm512_slli_epi32(high, 16));
}
