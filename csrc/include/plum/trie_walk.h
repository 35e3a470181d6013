// The states after whole prefixes.
#pragma once

#include <cstdint>

#include "plum/trie_index.h"

namespace plum::cpu {

// Writes the state that each prefix leads to from a root, or [0, 0). A prefix ends at its first -1;
// a code behind that leads to [0, 0) too.
//   roots     [count, 2] rows
//   prefixes  [count, length], length at most the number of levels
//   states    [count, 2] rows
void trie_walk(const int64_t* roots, const int64_t* prefixes, int64_t count, int64_t length,
               const Trie& trie, int64_t* states, int threads);

}  // namespace plum::cpu
