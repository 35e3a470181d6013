#include <cstdint>

#define PLUM_ISA avx2
#include "codebook_sums_kernel.inl"
