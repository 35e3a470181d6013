#include <immintrin.h>

#include <cstdint>

#include "residual_quantize_types.h"

namespace plum::cpu::avx2 {
namespace {

#include "residual_quantize_int16.inl"

}  // namespace

int64_t residual_quantize_block(const Problem& problem, int64_t begin, int64_t count, int64_t next,
                                float* workspace) {
  return quantize_block(problem, begin, count, next, workspace);
}

}  // namespace plum::cpu::avx2
