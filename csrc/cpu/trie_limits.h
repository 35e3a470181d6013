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
    if (denied_.empty()) return;
    end_ += denied_.size();
    begin_ = std::lower_bound(begin_, end_, range.low);
    end_ = std::lower_bound(begin_, end_, range.high);
  }

  bool filtered() const { return filter_.bits != nullptr; }
  bool denied() const { return begin_ != end_; }

  // Whether a row of a child is left.
  bool leaves(Rows child) const {
    int64_t left = reachable(child);
    if (left > 0 && denied()) {
      const int64_t* from = std::lower_bound(begin_, end_, child.low);
      left -= std::lower_bound(from, end_, child.high) - from;
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
      // Without a filter all rows of a child are denied only if its first one is.
      if (!filtered() && !begins(level, node, *at)) {
        ++at;
        continue;
      }
      const int64_t code = level.codes[level.starts == nullptr ? *at : edge_of(level, *at)];
      const Rows child = child_rows(level, node, code);
      const int64_t* after =
          std::lower_bound(at, std::min(end_, at + (child.high - *at)), child.high);
      if (after - at == reachable(child)) mask_[code / 64] &= ~(uint64_t{1} << (code % 64));
      at = std::max(after, at + 1);
    }
    return mask_.data();
  }

 private:
  int64_t reachable(Rows child) const {
    if (!filtered()) return child.high - child.low;
    if (child.high - child.low == 1) return bit(filter_.bits, child.low);
    return rank(filter_.bits, filter_.ranks, child.high) -
           rank(filter_.bits, filter_.ranks, child.low);
  }

  static bool begins(const TrieLevel& level, Node node, int64_t row) {
    if (level.starts != nullptr) return bit(level.begins, row);
    return row == node.first || level.codes[row] != level.codes[row - 1];
  }

  const Trie& trie_;
  const TrieFilter& filter_;
  std::vector<int64_t> denied_;
  const int64_t *begin_ = nullptr, *end_ = nullptr;
  std::vector<uint64_t> mask_;
};

}  // namespace plum::cpu
