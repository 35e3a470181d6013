// The variants that screen in fp32.

namespace plum::cpu::PLUM_ISA {
namespace {

using residual::Element;
using residual::kRowUnit;
using residual::Level;
using residual::Problem;
using residual::Row;

#include "simd.inl"

constexpr Element kScreen = Element::kFp32;

// Stores x and y and leaves their rounding errors in them: none.
inline void store_operand(Vec& x, Vec& y, float, float* operand) {
  store(operand, x);
  store(operand + kWidth, y);
  x = y = broadcast(0);
}

using Sum = Vec;
inline Vec multiply_add(Vec a, Vec b, Vec c) { return fma(a, b, c); }
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

}  // namespace plum::cpu::PLUM_ISA
