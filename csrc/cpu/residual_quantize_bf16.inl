// What the variants that screen in bf16 share: rounding of rows to pairs of bf16.

using residual::Element;
using residual::kRowUnit;
using residual::Level;
using residual::Problem;
using residual::Row;

#include "simd.inl"

constexpr Element kScreen = Element::kBf16;

// Stores x and y, 32 dimensions, and leaves their rounding errors in them. Dimension d of x and of
// y make a pair: a 32-bit element with y in its high half.
inline void store_operand(Vec& x, Vec& y, float, float* operand) {
  const __m512i half_unit = _mm512_set1_epi32(0x8000), high = _mm512_set1_epi32(~0xffff);
  const __m512i a = _mm512_add_epi32(_mm512_castps_si512(x), half_unit);
  const __m512i b = _mm512_add_epi32(_mm512_castps_si512(y), half_unit);
  // (b & high) | a >> 16
  _mm512_storeu_si512(operand, _mm512_ternarylogic_epi32(b, high, _mm512_srli_epi32(a, 16), 0xEA));
  x -= _mm512_castsi512_ps(_mm512_and_si512(a, high));
  y -= _mm512_castsi512_ps(_mm512_and_si512(b, high));
}
