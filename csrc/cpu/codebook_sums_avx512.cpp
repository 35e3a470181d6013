#include <cstdint>

#define PLUM_ISA avx512
#include "codebook_sums_kernel.inl"
