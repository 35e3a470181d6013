#include <immintrin.h>

#include <cstdint>

#include "trie_mask_types.h"

#define PLUM_ISA avx2
#include "trie_mask_kernel.inl"
