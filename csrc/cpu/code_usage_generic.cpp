#include <cstdint>

#define PLUM_ISA generic
#include "code_usage_kernel.inl"
