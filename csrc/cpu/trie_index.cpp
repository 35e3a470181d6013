#include "plum/trie_index.h"

namespace plum {

Trie make_trie(const TrieArrays& arrays) {
  Trie trie{arrays.rows, {}};
  trie.levels.reserve(arrays.depth);
  for (int64_t l = 0; l < arrays.depth; ++l) {
    const int64_t* at = arrays.table + l * kTrieFields;
    TrieLevel level{arrays.codes + at[0], nullptr, nullptr, nullptr, nullptr, at[5], at[6], at[7]};
    if (at[1] >= 0) {
      level.starts = arrays.starts + at[1];
      level.begins = arrays.begins + at[2];
      level.ranks = arrays.ranks + at[3];
    }
    if (at[4] >= 0) level.masks = arrays.masks + at[4];
    trie.levels.push_back(level);
  }
  return trie;
}

TrieFilter make_filter(const TrieArrays& arrays, const uint64_t* bits, const uint32_t* ranks,
                       const uint64_t* masks) {
  TrieFilter filter{bits, ranks, {}};
  filter.masks.reserve(arrays.depth);
  for (int64_t l = 0; l < arrays.depth; ++l) {
    const int64_t at = arrays.table[l * kTrieFields + 4];
    filter.masks.push_back(bits == nullptr || at < 0 ? nullptr : masks + at);
  }
  return filter;
}

}  // namespace plum
