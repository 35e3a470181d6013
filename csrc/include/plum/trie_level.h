// One level of a trie of SIDs, as SidTrie holds it.
#pragma once

#include <cstdint>

namespace plum {

//   starts  [edges + 1] first row of each edge, rising, closed by the number of rows
//   codes   [edges] rising among the edges of one parent
struct TrieLevel {
  const int64_t* starts;
  const int32_t* codes;
  int64_t edges;
};

}  // namespace plum
