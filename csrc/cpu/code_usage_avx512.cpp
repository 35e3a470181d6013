#include <cstdint>

#define PLUM_ISA avx512
#include "code_usage_kernel.inl"
