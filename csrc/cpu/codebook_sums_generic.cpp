#include <cstdint>

#define PLUM_ISA generic
#include "codebook_sums_kernel.inl"
