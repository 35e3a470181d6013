#include <cstdint>

#define PLUM_ISA avx2
#include "trie_mask_kernel.inl"
