#include <cstdint>

#include "residual_quantize_types.h"

#define PLUM_ISA generic
#include "residual_quantize_fp32.inl"
