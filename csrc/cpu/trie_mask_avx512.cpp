#include <cstdint>

#define PLUM_ISA avx512
#include "trie_mask_kernel.inl"
