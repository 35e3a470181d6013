#include <cstdint>

#include "trie_beam_step_types.h"

#define PLUM_ISA generic
#include "trie_beam_step_kernel.inl"
