#include <cstdint>

#define PLUM_ISA avx2
#include "code_usage_kernel.inl"
