// What a filter and a request's deny list leave of a trie.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "plum/trie_deny.h"
#include "trie_search.h"

namespace plum::cpu {

// How many of some rows, one at least, a filter leaves.
inline int64_t reachable(const TrieFilter& filter, Rows rows) {
  if (filter.bits == nullptr) return rows.high - rows.low;
  if (rows.low / 64 == (rows.high - 1) / 64) {
    const uint64_t bits = filter.bits[rows.low / 64] >> (rows.low % 64);
    return __builtin_popcountll(bits << (64 - (rows.high - rows.low)));
  }
  return rank(filter.bits, filter.ranks, rows.high) - rank(filter.bits, filter.ranks, rows.low);
}

class Limits {
 public:
  Limits(const Trie& trie, const TrieFilter& filter) : trie_(trie), filter_(filter) {}

  // Takes a request's list of a level among those that trie_deny wrote, [batch, levels, count]; or
  // null for none.
  void deny(const int64_t* dead, int64_t count, int64_t request, int64_t level) {
    if (dead == nullptr) return;
    dead_ = dead + (request * static_cast<int64_t>(trie_.levels.size()) + level) * count;
    dead_end_ = first_from(dead_, dead_ + count, kNoRow);
  }

  // Looks at the children of one beam from here on.
  void enter(Rows range) {
    begin_ = end_ = dead_;
    if (dead_ == dead_end_ || dead_end_[-1] < range.low || range.high <= *dead_) return;
    begin_ = end_ = first_from(dead_, dead_end_, range.low);
    if (begin_ != dead_end_ && *begin_ < range.high) {
      end_ = first_from(begin_, dead_end_, range.high);
    }
  }

  bool filtered() const { return filter_.bits != nullptr; }
  bool denied() const { return begin_ != end_; }

  // Whether a row of a child is left.
  bool leaves(Rows child) const {
    if (reachable(filter_, child) == 0) return false;
    if (!denied()) return true;
    const int64_t* at = first_from(begin_, end_, child.low);
    return at == end_ || *at != child.low;
  }

  // The mask of a beam's node, [words] of the level, with filter and deny list applied; or null if
  // the level has none.
  const uint64_t* mask(int64_t l, Rows range) {
    const TrieLevel& level = trie_.levels[l];
    const uint64_t* whole = mask_of(trie_, l, range, filtered() ? filter_.masks[l] : level.masks);
    if (whole == nullptr || !denied()) return whole;
    mask_.assign(whole, whole + level.words);
    for (const int64_t* at = begin_; at != end_; ++at) {
      const int64_t code = level.codes[level.starts == nullptr ? *at : edge_of(level, *at)];
      mask_[code / 64] &= ~(uint64_t{1} << (code % 64));
    }
    return mask_.data();
  }

 private:
  // The first of a rising list that is not below a value; without branches to guess.
  static const int64_t* first_from(const int64_t* begin, const int64_t* end, int64_t value) {
    int64_t count = end - begin;
    while (count > 1) {
      const int64_t half = count / 2;
      begin += begin[half - 1] < value ? half : 0;
      count -= half;
    }
    return begin + (count == 1 && *begin < value);
  }

  const Trie& trie_;
  const TrieFilter& filter_;
  const int64_t *dead_ = nullptr, *dead_end_ = nullptr;
  const int64_t *begin_ = nullptr, *end_ = nullptr;
  std::vector<uint64_t> mask_;
};

}  // namespace plum::cpu
