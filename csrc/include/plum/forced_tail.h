// The rest of the SID where only one is left.
#pragma once

#include <cstdint>

#include "plum/trie_index.h"

namespace plum::cpu {

// Writes the codes from `level` on where a state is a single row, else -1.
//   states  [count, 2] rows
//   tail    [count, levels of the trie - level]
//   forced  [count]
void forced_tail(const int64_t* states, int64_t count, const Trie& trie, int64_t level,
                 int64_t* tail, bool* forced, int threads);

}  // namespace plum::cpu
