#include <immintrin.h>

#include <cstdint>

#include "residual_quantize_types.h"

#define PLUM_ISA avx512
#include "residual_quantize_fp32.inl"
