#include <immintrin.h>

#include <cstdint>

#include "residual_quantize_types.h"

#define PLUM_ISA avx512_vnni
#include "residual_quantize_int16.inl"
