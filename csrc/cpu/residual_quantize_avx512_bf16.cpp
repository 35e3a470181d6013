#include <immintrin.h>

#include <cstdint>

#include "residual_quantize_types.h"

namespace plum::cpu::avx512_bf16 {
namespace {

#include "residual_quantize_bf16.inl"

using Sum = Vec;
inline Vec multiply_add(Vec a, Vec b, Vec c) {
  return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
inline Vec first_sum(const Level& level, int64_t at) { return load(level.bias + at); }
struct Scale {
  Scale(const Level&, int64_t) {}
};
inline Vec score_of(Vec sum, const Scale&, const Row&) { return sum; }

#include "residual_quantize_dot.inl"
#include "residual_quantize_kernel.inl"

}  // namespace

int64_t residual_quantize_block(const Problem& problem, int64_t begin, int64_t count, int64_t next,
                                float* workspace, int64_t* compared) {
  return quantize_block(problem, begin, count, next, workspace, compared);
}

}  // namespace plum::cpu::avx512_bf16
