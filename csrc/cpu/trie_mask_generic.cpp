#include <cstdint>

#define PLUM_ISA generic
#include "trie_mask_kernel.inl"
