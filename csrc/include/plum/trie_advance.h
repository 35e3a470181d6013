// The states after one more code.
#pragma once

#include <cstdint>

#include "plum/trie_level.h"

namespace plum::cpu {

// Writes the state that follows states[i] by codes[i], or [0, 0).
//   states, after  [count, 2] rows
//   tokens         [count]
void trie_advance(const int64_t* states, const int64_t* tokens, int64_t count,
                  const TrieLevel& level, int64_t* after, int threads);

}  // namespace plum::cpu
