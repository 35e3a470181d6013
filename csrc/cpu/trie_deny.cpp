#include "plum/trie_deny.h"

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "trie_limits.h"

namespace plum::cpu {
namespace {

// Below this many rows a thread, starting threads costs more than it saves.
constexpr int64_t kRowsPerThread = 1 << 12;

class Denied {
 public:
  Denied(const Trie& trie, const TrieRoots& roots, const TrieFilter& filter)
      : trie_(trie), roots_(roots), filter_(filter) {}

  void run(const int64_t* rows, int64_t count, int64_t* dead) {
    take(rows, count);
    const auto denied = static_cast<int64_t>(rows_.size());
    for (const TrieLevel& level : trie_.levels) {
      int64_t found = 0;
      for (int64_t i = 0; i < denied;) {
        const Rows child = child_of(level, below_[i], rows_[i]);
        const int64_t first = i;
        for (; i < denied && rows_[i] < child.high; ++i) below_[i] = child;
        if (!leaves_more_than(child, i - first)) dead[found++] = child.low;
      }
      std::fill(dead + found, dead + count, kNoRow);
      dead += count;
    }
  }

 private:
  // Takes a request's rows that may be reached, rising, and the trie that each is in.
  void take(const int64_t* rows, int64_t count) {
    rows_.clear();
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = rows[i];
      if (row < 0 || row >= trie_.rows) continue;
      if (filter_.bits == nullptr || bit(filter_.bits, row)) rows_.push_back(row);
    }
    sort();
    rows_.erase(std::unique(rows_.begin(), rows_.end()), rows_.end());
    below_.clear();
    const int64_t* root = roots_.rows;
    for (const int64_t row : rows_) {
      while (root[1] <= row) ++root;
      below_.push_back({root[0], root[1]});
    }
  }

  // A byte at a time, the last first.
  void sort() {
    if (std::is_sorted(rows_.begin(), rows_.end())) return;
    sorted_.resize(rows_.size());
    for (int shift = 0; (trie_.rows - 1) >> shift != 0; shift += 8) {
      int64_t places[257] = {};
      for (const int64_t row : rows_) ++places[(row >> shift & 255) + 1];
      for (int byte = 0; byte < 256; ++byte) places[byte + 1] += places[byte];
      for (const int64_t row : rows_) sorted_[places[row >> shift & 255]++] = row;
      rows_.swap(sorted_);
    }
  }

  // Whether the filter leaves more than `count` rows of a child; most often the first words say so.
  bool leaves_more_than(Rows child, int64_t count) const {
    if (child.high - child.low == count) return false;
    if (filter_.bits == nullptr || child.high - child.low > kRankBits) {
      return reachable(filter_, child) > count;
    }
    for (int64_t low = child.low; low < child.high && count >= 0; low = (low / 64 + 1) * 64) {
      count -= reachable(filter_, {low, std::min(child.high, (low / 64 + 1) * 64)});
    }
    return count < 0;
  }

  // The child that holds `row`, of the node with the rows `range`.
  static Rows child_of(const TrieLevel& level, Rows range, int64_t row) {
    if (range.high - range.low == 1) return range;
    if (level.starts != nullptr) {
      const int64_t edge = edge_of(level, row);
      return {level.starts[edge], level.starts[edge + 1]};
    }
    // Most runs are short: their ends are looked for in steps that double.
    const uint16_t* codes = level.codes;
    const uint16_t code = codes[row];
    int64_t below = 1, above = 1;
    while (row - below >= range.low && codes[row - below] == code) below *= 2;
    while (row + above < range.high && codes[row + above] == code) above *= 2;
    const uint16_t* low = codes + std::max(range.low, row - below);
    const uint16_t* high = codes + std::min(range.high, row + above);
    return {std::lower_bound(low, codes + row - below / 2, code) - codes,
            std::upper_bound(codes + row + above / 2, high, code) - codes};
  }

  const Trie& trie_;
  const TrieRoots& roots_;
  const TrieFilter& filter_;
  std::vector<int64_t> rows_, sorted_;
  std::vector<Rows> below_;
};

}  // namespace

void trie_deny(const DenyLists& deny, const Trie& trie, const TrieRoots& roots,
               const TrieFilter& filter, int64_t* dead, int threads) {
  const int64_t wanted = std::min(deny.batch, deny.batch * deny.count / kRowsPerThread);
  const int workers = static_cast<int>(std::clamp<int64_t>(wanted, 1, threads));
  const int64_t lists = static_cast<int64_t>(trie.levels.size()) * deny.count;
  parallel(workers, [&](int worker) {
    Denied denied(trie, roots, filter);
    const int64_t end = deny.batch * (worker + 1) / workers;
    for (int64_t b = deny.batch * worker / workers; b < end; ++b) {
      denied.run(deny.rows + b * deny.count, deny.count, dead + b * lists);
    }
  });
}

}  // namespace plum::cpu
