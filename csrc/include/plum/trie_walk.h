// The states after whole prefixes.
#pragma once

#include <cstdint>
#include <vector>

#include "plum/trie_level.h"

namespace plum::cpu {

// Writes the state of each prefix, or [0, 0). A prefix ends at its first -1.
//   prefixes  [count, length], length at most the number of levels
//   states    [count, 2] rows
void trie_walk(const int64_t* prefixes, int64_t count, int64_t length,
               const std::vector<TrieLevel>& levels, int64_t* states, int threads);

}  // namespace plum::cpu
