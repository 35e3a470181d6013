#include <immintrin.h>

#include <cstdint>

#include "trie_beam_step_types.h"

#define PLUM_ISA avx2
#include "trie_beam_step_kernel.inl"
