// Which children of a trie are left with nothing once the rows a request is denied are gone.
#pragma once

#include <cstdint>
#include <limits>

#include "plum/trie_index.h"

namespace plum::cpu {

// Stands behind the last row of a list; above every row.
constexpr int64_t kNoRow = std::numeric_limits<int64_t>::max();

// Denied rows of each request, [batch, count], in any order and any of them several times; what is
// no row is left out.
struct DenyLists {
  const int64_t* rows;
  int64_t batch, count;
};

// The first rows of joined tries in the table, closed by the number of rows: [tries + 1].
struct TrieRoots {
  const int64_t* rows;
  int64_t tries;
};

// Fills `dead` [batch, levels of the trie, count]: the first row, rising, of each child of which
// the filter leaves a row and the deny list none, then kNoRow.
void trie_deny(const DenyLists& deny, const Trie& trie, const TrieRoots& roots,
               const TrieFilter& filter, int64_t* dead, int threads);

}  // namespace plum::cpu
