// The rest of the SID where only one is left.
#pragma once

#include <cstdint>
#include <vector>

#include "plum/trie_level.h"

namespace plum::cpu {

// Writes the codes that are left where a state is a single row, else -1.
//   states  [count, 2] rows
//   tail    [count, levels]
//   forced  [count]
void forced_tail(const int64_t* states, int64_t count, const std::vector<TrieLevel>& levels,
                 int64_t* tail, bool* forced, int threads);

}  // namespace plum::cpu
