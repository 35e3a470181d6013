// The states after one more code.
#pragma once

#include <cstdint>

#include "plum/trie_index.h"

namespace plum::cpu {

// Writes the state that follows states[i] by tokens[i], or [0, 0); none follows at a level that the
// trie has not.
//   states, after  [count, 2] rows
//   tokens         [count]
void trie_advance(const int64_t* states, const int64_t* tokens, int64_t count, const Trie& trie,
                  RowLevels levels, int64_t* after, int threads);

}  // namespace plum::cpu
