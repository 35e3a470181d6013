// What a filter and a request's deny list leave of a trie.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "trie_search.h"

namespace plum::cpu {

class Limits {
 public:
  Limits(const Trie& trie, const TrieFilter& filter) : trie_(trie), filter_(filter) {}

  // Takes the denied rows of a request, in any order and any of them several times; what is no row
  // or may not be reached anyway is left out, or it would be counted twice.
  void deny(const int64_t* rows, int64_t count) {
    denied_.clear();
    bool rising = true;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = rows[i];
      if (row < 0 || row >= trie_.rows || (filtered() && !bit(filter_.bits, row))) continue;
      rising &= denied_.empty() || denied_.back() < row;
      denied_.push_back(row);
    }
    if (!rising) {
      std::sort(denied_.begin(), denied_.end());
      denied_.erase(std::unique(denied_.begin(), denied_.end()), denied_.end());
    }
  }

  // Looks at the denied rows of one beam from here on.
  void enter(Rows range) {
    begin_ = end_ = denied_.data();
    if (denied_.empty() || denied_.back() < range.low || range.high <= denied_.front()) return;
    const int64_t* stop = end_ + denied_.size();
    begin_ = end_ = first_from(begin_, stop, range.low);
    if (begin_ != stop && *begin_ < range.high) end_ = first_from(begin_, stop, range.high);
  }

  bool filtered() const { return filter_.bits != nullptr; }
  bool denied() const { return begin_ != end_; }

  // Whether a row of a child is left.
  bool leaves(Rows child) const {
    int64_t left = reachable(child);
    if (left > 0 && denied()) {
      const int64_t* from = first_from(begin_, end_, child.low);
      while (left > 0 && from != end_ && *from < child.high) ++from, --left;
    }
    return left > 0;
  }

  // The mask of a beam's node, [words] of the level, with filter and deny list applied; or null if
  // the level has none.
  const uint64_t* mask(int64_t l, Rows range, Node node) {
    const TrieLevel& level = trie_.levels[l];
    const uint64_t* whole = mask_of(trie_, l, range, filtered() ? filter_.masks[l] : level.masks);
    if (whole == nullptr || !denied()) return whole;
    mask_.assign(whole, whole + level.words);
    for (const int64_t* at = begin_; at != end_;) {
      // All that is left of a child can only be denied from the first row that is left on.
      if (filtered() ? follows_one(level, *at) : !begins(level, node, *at)) {
        ++at;
        continue;
      }
      int64_t code;
      const Rows child = child_at(level, node, *at, &code);
      const int64_t* after = at;
      while (after != end_ && *after < child.high) ++after;
      const bool others =
          filtered() && (any_bit(child.low, *at) || any_bit(after[-1] + 1, child.high));
      if (!others && after - at == reachable(child)) {
        mask_[code / 64] &= ~(uint64_t{1} << (code % 64));
      }
      at = after;
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

  // The bits of the word that holds `low`, from `low` on and before `high`.
  uint64_t bits_of_word(int64_t low, int64_t high) const {
    const uint64_t bits = filter_.bits[low / 64] >> (low % 64);
    return high - low < 64 ? bits & ((uint64_t{1} << (high - low)) - 1) : bits;
  }

  bool any_bit(int64_t low, int64_t high) const {
    for (; low < high; low = (low / 64 + 1) * 64) {
      if (bits_of_word(low, high)) return true;
    }
    return false;
  }

  int64_t reachable(Rows child) const {
    if (!filtered()) return child.high - child.low;
    if (child.low / 64 == (child.high - 1) / 64) {
      return __builtin_popcountll(bits_of_word(child.low, child.high));
    }
    return rank(filter_.bits, filter_.ranks, child.high) -
           rank(filter_.bits, filter_.ranks, child.low);
  }

  static bool begins(const TrieLevel& level, Node node, int64_t row) {
    if (level.starts != nullptr) return bit(level.begins, row);
    return row == node.first || level.codes[row] != level.codes[row - 1];
  }

  // Whether a row of the same child that may be reached lies before `row`, as far as one word says.
  bool follows_one(const TrieLevel& level, int64_t row) const {
    if (level.starts == nullptr) return false;
    const uint64_t before = (uint64_t{1} << (row % 64)) - 1;
    const uint64_t starts = level.begins[row / 64] & (before << 1 | 1);
    const uint64_t own =
        starts == 0 ? ~uint64_t{0} : ~uint64_t{0} << (63 - __builtin_clzll(starts));
    return (filter_.bits[row / 64] & before & own) != 0;
  }

  // The child whose rows hold `row`, and its code.
  static Rows child_at(const TrieLevel& level, Node node, int64_t row, int64_t* code) {
    if (level.starts != nullptr) {
      const int64_t edge = edge_of(level, row);
      *code = level.codes[edge];
      return {level.starts[edge], level.starts[edge + 1]};
    }
    *code = level.codes[row];
    Rows rows{row, row + 1};
    while (rows.low > node.first && level.codes[rows.low - 1] == *code) --rows.low;
    while (rows.high < node.last && level.codes[rows.high] == *code) ++rows.high;
    return rows;
  }

  const Trie& trie_;
  const TrieFilter& filter_;
  std::vector<int64_t> denied_;
  const int64_t *begin_ = nullptr, *end_ = nullptr;
  std::vector<uint64_t> mask_;
};

}  // namespace plum::cpu
