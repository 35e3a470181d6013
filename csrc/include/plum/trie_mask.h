// Logits of illegal codes to -inf.
#pragma once

#include <cstdint>

#include "plum/trie_index.h"

namespace plum::cpu {

// Copies each row, with `fill`, the bits of -inf, in every column that is not the column of a child
// of its state; in all of them at a level that the trie has not.
//   logits   [rows, width] of 4 or 2 bytes each, `stride` elements from row to row
//   masked   the same, `masked_stride` apart; may be `logits`
//   states   [rows, 2]
//   columns  [levels of the trie] column of code 0
template <typename Word>
void trie_mask(const Word* logits, int64_t stride, Word* masked, int64_t masked_stride, Word fill,
               int64_t rows, int64_t width, const int64_t* states, const Trie& trie,
               RowLevels levels, const int64_t* columns, int threads);

}  // namespace plum::cpu
