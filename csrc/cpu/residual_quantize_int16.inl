// The variants that screen in int16: rows and codewords as numbers of steps, whose products have
// exact sums.

namespace plum::cpu::PLUM_ISA {
namespace {

using residual::Element;
using residual::kRowUnit;
using residual::Level;
using residual::Problem;
using residual::Row;

#include "simd.inl"

constexpr Element kScreen = Element::kInt16;

typedef int32_t Sum __attribute__((vector_size(sizeof(Vec))));

#if defined(__AVX512VNNI__)
inline Vec as_floats(Bits a) { return _mm512_cvtepi32_ps(a); }
// The low halves of a and of b.
inline Vec pairs(Vec a, Vec b) {
  const Bits high = _mm512_slli_epi32(_mm512_castps_si512(b), 16);
  return _mm512_castsi512_ps(_mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_castps_si512(a), high));
}
inline Sum multiply_add(Vec a, Vec b, Sum sum) {
  return reinterpret_cast<Sum>(_mm512_dpwssd_epi32(reinterpret_cast<Bits>(sum),
                                                   _mm512_castps_si512(a), _mm512_castps_si512(b)));
}
#else
inline Vec as_floats(Bits a) { return _mm256_cvtepi32_ps(a); }
inline Vec pairs(Vec a, Vec b) {
  const Bits high = _mm256_slli_epi32(_mm256_castps_si256(b), 16);
  return _mm256_castsi256_ps(_mm256_blend_epi16(_mm256_castps_si256(a), high, 0xaa));
}
inline Sum multiply_add(Vec a, Vec b, Sum sum) {
  return sum +
         reinterpret_cast<Sum>(_mm256_madd_epi16(_mm256_castps_si256(a), _mm256_castps_si256(b)));
}
#endif

// Stores x and y as numbers of steps and leaves their rounding errors in them. Dimension d of x and
// of y make a pair: a 32-bit element with y in its high half. Floats as large as `zero` are whole
// numbers, which the low bits of theirs hold.
inline void store_operand(Vec& x, Vec& y, float step, float* operand) {
  const Vec zero = broadcast(0x1.8p23f), per_step = broadcast(1 / step), back = broadcast(-step);
  const Vec a = fma(x, per_step, zero), b = fma(y, per_step, zero);
  store(operand, pairs(a, b));
  x = fma(a - zero, back, x);
  y = fma(b - zero, back, y);
}

inline Sum first_sum(const Level&, int64_t) { return Sum{}; }
struct Scale {
  Scale(const Level& level, int64_t at)
      : step(broadcast(level.step)), bias(load(level.bias + at)) {}
  Vec step, bias;
};
// One step after the other: their product may be too small for a float.
inline Vec score_of(Sum sum, const Scale& scale, const Row& row) {
  const Vec product = as_floats(reinterpret_cast<Bits>(sum)) * broadcast(row.step);
  return fma(product, scale.step, scale.bias);
}

#include "residual_quantize_dot.inl"
#include "residual_quantize_kernel.inl"

}  // namespace

int64_t residual_quantize_block(const Problem& problem, int64_t begin, int64_t count, int64_t next,
                                float* workspace, int64_t* compared) {
  return quantize_block(problem, begin, count, next, workspace, compared);
}

}  // namespace plum::cpu::PLUM_ISA
