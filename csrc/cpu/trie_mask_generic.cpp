#include <cstdint>

#include "trie_mask_types.h"

#define PLUM_ISA generic
#include "trie_mask_kernel.inl"
