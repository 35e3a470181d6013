// The variant that screens in int8, four dimensions in the place of one, and bounds scores from
// above.
#include <immintrin.h>

#include <cstdint>

#include "residual_quantize_types.h"

namespace plum::cpu::avx512_int8 {
namespace {

using residual::Element;
using residual::kRowUnit;
using residual::Level;
using residual::Problem;
using residual::Row;

#include "simd.inl"

constexpr Element kScreen = Element::kInt8;

typedef int32_t Sum __attribute__((vector_size(sizeof(Vec))));

inline Sum multiply_add(Vec a, Vec b, Sum sum) {
  return reinterpret_cast<Sum>(_mm512_dpbusd_epi32(reinterpret_cast<Bits>(sum),
                                                   _mm512_castps_si512(a), _mm512_castps_si512(b)));
}

// Stores 16 numbers of steps, with the offset that makes them unsigned, and leaves their rounding
// errors. Floats as large as `zero` are whole numbers, which the low bits of theirs hold.
inline void store_bytes(Vec& x, float step, float* operand) {
  const Vec zero = broadcast(0x1.8p23f + residual::kByteOffset);
  const Vec shifted = fma(x, broadcast(1 / step), zero);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(operand),
                   _mm512_cvtepi32_epi8(_mm512_castps_si512(shifted)));
  x = fma(shifted - zero, broadcast(-step), x);
}

inline void store_operand(Vec& x, Vec& y, float step, float* operand) {
  store_bytes(x, step, operand);
  store_bytes(y, step, operand + kWidth / 4);
}

inline Sum first_sum(const Level& level, int64_t at) {
  return reinterpret_cast<Sum>(_mm512_loadu_si512(level.start + at));
}

struct Scale {
  Scale(const Level& level, int64_t at)
      : steps(load(level.steps + at)),
        bias(load(level.bias + at)),
        errors(load(level.errors + at)),
        norms(load(level.norms + at)) {}
  Vec steps, bias, errors, norms;
};
// The most that the scores can be. One step after the other: their product may be too small for a
// float.
inline Vec score_of(Sum sum, const Scale& scale, const Row& row) {
  const Vec product = _mm512_cvtepi32_ps(reinterpret_cast<Bits>(sum)) * broadcast(row.step);
  // Cauchy-Schwarz: |t.c' - t~.c~| <= |t| |c' - c~| + |t - t~| |c~|, where t~ and c~ are
  // multiplied.
  Vec most = fma(broadcast(row.bounds[0]), scale.errors, scale.bias);
  most = fma(broadcast(row.bounds[1]), scale.norms, most);
  return fma(product, scale.steps, most);
}

#include "residual_quantize_dot.inl"
#include "residual_quantize_kernel.inl"

}  // namespace

int64_t residual_quantize_block(const Problem& problem, int64_t begin, int64_t count, int64_t next,
                                float* workspace, int64_t* compared) {
  return quantize_block(problem, begin, count, next, workspace, compared);
}

}  // namespace plum::cpu::avx512_int8
