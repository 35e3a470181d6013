// What the trie ops share: nodes below states, and the rows of their children.
#pragma once

#include <algorithm>
#include <cstdint>

#include "plum/trie_index.h"

namespace plum::cpu {

// Set bits before each block of so many are counted.
constexpr int64_t kRankBits = 512;

// How many of the first `count` bits are set.
inline int64_t rank(const uint64_t* bits, const uint32_t* ranks, int64_t count) {
  const int64_t block = count / kRankBits, end = count / 64;
  int64_t set = ranks[block];
  for (int64_t word = block * (kRankBits / 64); word < end; ++word) {
    set += __builtin_popcountll(bits[word]);
  }
  const uint64_t rest = (uint64_t{1} << (count % 64)) - 1;
  return rest == 0 ? set : set + __builtin_popcountll(bits[end] & rest);
}

inline bool bit(const uint64_t* bits, int64_t at) { return bits[at / 64] >> (at % 64) & 1; }

struct Rows {
  int64_t low, high;
};

// Where the children of a state are in a level's codes: edges of a csr level, rows of a matrix one.
struct Node {
  int64_t first, last;
  bool empty() const { return first >= last; }
};

// The range of a state, two rows of any value: those outside the trie are clamped to it.
inline Rows clamped(const Trie& trie, const int64_t* state) {
  const int64_t low = std::clamp<int64_t>(state[0], 0, trie.rows);
  return {low, std::clamp<int64_t>(state[1], low, trie.rows)};
}

// The node of a range.
inline Node node_of(const TrieLevel& level, Rows range) {
  if (level.starts == nullptr || range.low == range.high) return {range.low, range.high};
  const int64_t first = rank(level.begins, level.ranks, range.low);
  // A range that is no node may end before its first run begins.
  return {first, std::max(first, rank(level.begins, level.ranks, range.high))};
}

// The edge of a csr level whose run holds `row`.
inline int64_t edge_of(const TrieLevel& level, int64_t row) {
  return rank(level.begins, level.ranks, row + 1) - 1;
}

// The mask of the node of a range that is not empty, among those given for each level: [words], or
// null.
inline const uint64_t* mask_of(const Trie& trie, int64_t level, Rows range, const uint64_t* masks) {
  if (masks == nullptr) return nullptr;
  const int64_t node = level == 0 ? 0 : edge_of(trie.levels[level - 1], range.low);
  return masks + node * trie.levels[level].words;
}

// The rows of a node's child, or none.
inline Rows child_rows(const TrieLevel& level, Node node, int64_t code) {
  const uint16_t *begin = level.codes + node.first, *end = level.codes + node.last;
  if (begin == end || code < *begin || code > UINT16_MAX) return {0, 0};
  if (level.starts == nullptr) {
    const uint16_t* found = std::lower_bound(begin, end, code);
    if (found == end || *found != code) return {0, 0};
    // Most runs are short: their end is looked for in steps that double.
    int64_t step = 1;
    while (found + step < end && found[step] == code) step *= 2;
    const uint16_t* stop = std::upper_bound(found + step / 2, std::min(found + step, end), code);
    return {found - level.codes, stop - level.codes};
  }
  // Codes rise by at least 1 from child to child.
  end = begin + std::min<int64_t>(end - begin, code - *begin + 1);
  const uint16_t* found = std::lower_bound(begin, end, code);
  if (found == end || *found != code) return {0, 0};
  const int64_t edge = found - level.codes;
  return {level.starts[edge], level.starts[edge + 1]};
}

// Calls visit(code, rows) for each child of a node; codes rise.
template <typename Visit>
void visit_children(const TrieLevel& level, Node node, const Visit& visit) {
  for (int64_t i = node.first, next; i < node.last; i = next) {
    next = i + 1;
    if (level.starts != nullptr) {
      visit(level.codes[i], Rows{level.starts[i], level.starts[next]});
    } else {
      while (next < node.last && level.codes[next] == level.codes[i]) ++next;
      visit(level.codes[i], Rows{i, next});
    }
  }
}

// Writes the state that follows `state` by a code, [0, 0) where none does.
inline void advance(const Trie& trie, const TrieLevel& level, const int64_t* state, int64_t code,
                    int64_t* after) {
  const Rows rows = child_rows(level, node_of(level, clamped(trie, state)), code);
  after[0] = rows.low;
  after[1] = rows.high;
}

}  // namespace plum::cpu
