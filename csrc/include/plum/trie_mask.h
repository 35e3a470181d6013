// Logits of illegal codes to -inf, in place.
#pragma once

#include <cstdint>

#include "plum/trie_index.h"

namespace plum::cpu {

// Writes `fill`, the bits of -inf, to every column of each row that is not the column of a child of
// its state; to all of them at a level that the trie has not.
//   logits   [rows, width] of 4 or 2 bytes each, `stride` elements from row to row
//   states   [rows, 2]
//   columns  [levels of the trie] column of code 0
template <typename Word>
void trie_mask(Word* logits, Word fill, int64_t rows, int64_t width, int64_t stride,
               const int64_t* states, const Trie& trie, RowLevels levels, const int64_t* columns,
               int threads);

}  // namespace plum::cpu
