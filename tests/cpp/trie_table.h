// A random table of distinct SIDs in order, and the levels of its trie.
#pragma once

#include <algorithm>
#include <cstdint>
#include <random>
#include <vector>

#include "plum/trie_level.h"

struct TrieTable {
  TrieTable(int64_t rows, int64_t levels_wanted, int64_t codes, std::mt19937_64& random)
      : depth(levels_wanted), size(codes), starts(depth), edge_codes(depth) {
    for (int64_t i = 0; i < rows; ++i) {
      std::vector<int64_t> sid(depth);
      for (int64_t& code : sid) code = random() % size;
      table.push_back(sid);
    }
    std::sort(table.begin(), table.end());
    table.erase(std::unique(table.begin(), table.end()), table.end());
    const auto distinct = static_cast<int64_t>(table.size());
    for (int64_t l = 0; l < depth; ++l) {
      for (int64_t i = 0; i < distinct; ++i) {
        if (i > 0 && std::equal(table[i].begin(), table[i].begin() + l + 1, table[i - 1].begin())) {
          continue;
        }
        starts[l].push_back(i);
        edge_codes[l].push_back(static_cast<int32_t>(table[i][l]));
      }
      starts[l].push_back(distinct);
      levels.push_back(
          {starts[l].data(), edge_codes[l].data(), static_cast<int64_t>(edge_codes[l].size())});
    }
  }

  int64_t depth, size;
  std::vector<std::vector<int64_t>> table, starts;
  std::vector<std::vector<int32_t>> edge_codes;
  std::vector<plum::TrieLevel> levels;
};
