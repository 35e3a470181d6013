#include <immintrin.h>

#include <cstdint>

#include "residual_quantize_types.h"

#define PLUM_ISA avx512_int16
#include "residual_quantize_int16.inl"
