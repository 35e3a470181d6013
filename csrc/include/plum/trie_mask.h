// Logits of illegal codes to -inf, in place.
#pragma once

#include <cstdint>

#include "plum/trie_level.h"

namespace plum::cpu {

// Writes `fill`, the bits of -inf, to every column of each row that is not offset + code of a
// child of its state.
//   logits  [rows, width] of 4 or 2 bytes each, `stride` elements from row to row
//   states  [rows, 2]
template <typename Word>
void trie_mask(Word* logits, Word fill, int64_t rows, int64_t width, int64_t stride,
               const int64_t* states, const TrieLevel& level, int64_t offset, int threads);

}  // namespace plum::cpu
