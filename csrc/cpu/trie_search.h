// What the trie ops share: the edges below states, searched for many states side by side.
#pragma once

#include <algorithm>
#include <cstdint>

#include "plum/trie_level.h"

namespace plum::cpu {

// States a call: the cache misses of their searches overlap.
constexpr int64_t kSearches = 16;

// Moves each low[i] to the first start not below key[i] among the `length[i]` that follow it, or
// behind them. Lengths are used up.
inline void lower_bounds(const int64_t* starts, const int64_t* key, int64_t count, int64_t* low,
                         int64_t* length) {
  int64_t longest = 0;
  for (int64_t i = 0; i < count; ++i) longest = std::max(longest, length[i]);
  for (; longest > 0; longest >>= 1) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t half = length[i] >> 1, middle = low[i] + half;
      const bool below = (length[i] > 0) & (starts[middle] < key[i]);
      low[i] = below ? middle + 1 : low[i];
      length[i] = below ? length[i] - half - 1 : half;
    }
  }
}

// The first edge of the level that starts at a row not below rows[2 * i], and that row, clamped to
// the level. Up to kSearches of them.
inline void first_edges(const TrieLevel& level, const int64_t* rows, int64_t count, int64_t* row,
                        int64_t* edge) {
  const int64_t total = level.starts[level.edges];
  int64_t length[kSearches];
  for (int64_t i = 0; i < count; ++i) {
    row[i] = std::clamp<int64_t>(rows[2 * i], 0, total);
    // Starts rise by at least 1 from edge to edge: near the leaves little is left to search.
    edge[i] = std::max<int64_t>(0, level.edges - (total - row[i]));
    length[i] = std::min(row[i], level.edges) - edge[i];
  }
  lower_bounds(level.starts, row, count, edge, length);
}

// Edge ranges [first[i], last[i]) of the children of up to kSearches states.
//   states  [count, 2] rows, any values: those outside the level are clamped to it
inline void child_ranges(const TrieLevel& level, const int64_t* states, int64_t count,
                         int64_t* first, int64_t* last) {
  int64_t row[kSearches], length[kSearches];
  first_edges(level, states, count, row, first);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t end = std::clamp<int64_t>(states[2 * i + 1], 0, level.starts[level.edges]);
    length[i] = std::clamp<int64_t>(end - row[i], 0, level.edges - first[i]);
    last[i] = first[i];
    row[i] = end;
  }
  lower_bounds(level.starts, row, count, last, length);
}

// The edge of `code` among the edges [first, last), or -1.
inline int64_t find_code(const int32_t* codes, int64_t first, int64_t last, int64_t code) {
  if (first == last || code < codes[first]) return -1;
  // Codes rise by at least 1 from sibling to sibling.
  last = std::min(last - first, code - codes[first] + 1) + first;
  const int32_t* found = std::lower_bound(codes + first, codes + last, code);
  return found != codes + last && *found == code ? found - codes : -1;
}

// Writes the states that follow up to kSearches states by a code each, [0, 0) where none does.
inline void advance(const TrieLevel& level, const int64_t* states, const int64_t* tokens,
                    int64_t count, int64_t* after) {
  int64_t first[kSearches], last[kSearches];
  child_ranges(level, states, count, first, last);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t edge = find_code(level.codes, first[i], last[i], tokens[i]);
    after[2 * i] = edge < 0 ? 0 : level.starts[edge];
    after[2 * i + 1] = edge < 0 ? 0 : level.starts[edge + 1];
  }
}

}  // namespace plum::cpu
