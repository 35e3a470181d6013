// trie_mask, trie_walk, trie_advance and forced_tail against loops over a table of SIDs.
#include <algorithm>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "plum/cpu_features.h"
#include "plum/forced_tail.h"
#include "plum/trie_advance.h"
#include "plum/trie_mask.h"
#include "plum/trie_walk.h"
#include "trie_table.h"

namespace {

using Sid = std::vector<int64_t>;

void check_walks(const TrieTable& trie, std::mt19937_64& random, int threads) {
  const int64_t depth = trie.depth;
  std::vector<int64_t> prefixes, expected, next, after_next;
  const int64_t count = 40;
  for (int64_t i = 0; i < count; ++i) {
    Sid prefix = trie.table[random() % trie.table.size()];
    prefix.resize(random() % (depth + 1));
    if (!prefix.empty() && random() % 3 == 0) prefix.back() = random() % trie.size;
    const auto state = trie.range_of(prefix);
    expected.insert(expected.end(), state.begin(), state.end());
    prefix.resize(depth, -1);
    prefixes.insert(prefixes.end(), prefix.begin(), prefix.end());
  }
  std::vector<int64_t> states(2 * count, -7), roots;
  for (int64_t i = 0; i < count; ++i) roots.insert(roots.end(), {0, trie.rows});
  plum::cpu::trie_walk(roots.data(), prefixes.data(), count, depth, trie.trie, states.data(),
                       threads);
  CHECK(states == expected);

  for (int64_t level = 0; level < depth; ++level) {
    const Sid prefix(trie.table[0].begin(), trie.table[0].begin() + level);
    for (int64_t token = -1; token <= trie.size; ++token) {
      Sid longer = prefix;
      longer.push_back(token);
      const std::vector<int64_t> state = trie.range_of(prefix);
      std::vector<int64_t> after(2, -7);
      plum::cpu::trie_advance(state.data(), &token, 1, trie.trie, {level, nullptr}, after.data(),
                              threads);
      CHECK(after == trie.range_of(longer));
    }
    const int64_t rows = trie.rows;
    std::vector<int64_t> ranges, tail(rows * (depth - level), -7);
    for (const Sid& sid : trie.table) {
      const auto state = trie.range_of(Sid(sid.begin(), sid.begin() + level));
      ranges.insert(ranges.end(), state.begin(), state.end());
    }
    // No row of the table, and so far apart that their difference overflows.
    constexpr int64_t kLeast = std::numeric_limits<int64_t>::min();
    const int64_t other[] = {kLeast, kLeast + 1, 1, kLeast};
    std::vector<int64_t> no_tail(2 * (depth - level), -7);
    bool neither[] = {true, true};
    plum::cpu::forced_tail(other, 2, trie.trie, level, no_tail.data(), neither, threads);
    CHECK(!neither[0] && !neither[1] && no_tail == std::vector<int64_t>(no_tail.size(), -1));
    std::vector<char> forced(rows);
    plum::cpu::forced_tail(ranges.data(), rows, trie.trie, level, tail.data(),
                           reinterpret_cast<bool*>(forced.data()), threads);
    for (int64_t i = 0; i < rows; ++i) {
      const bool lone = ranges[2 * i + 1] - ranges[2 * i] == 1;
      CHECK(forced[i] == lone);
      for (int64_t l = level; l < depth; ++l) {
        CHECK(tail[i * (depth - level) + l - level] == (lone ? trie.table[i][l] : -1));
      }
    }
  }
}

template <typename Word>
void check_mask(const TrieTable& trie, std::mt19937_64& random, int64_t offset, int threads) {
  const Word fill = static_cast<Word>(0xff80ff80u);
  const int64_t rows = 70, width = offset + trie.size + offset, stride = width + 3;
  for (int64_t level = 0; level < trie.depth; ++level) {
    std::vector<Word> logits(rows * stride), expected;
    for (Word& word : logits) word = static_cast<Word>(random() % 1000);
    expected = logits;
    std::vector<int64_t> states;
    for (int64_t row = 0; row < rows; ++row) {
      Sid prefix = trie.table[random() % trie.table.size()];
      prefix.resize(level);
      const auto state = row == 3 ? std::vector<int64_t>{0, 0} : trie.range_of(prefix);
      states.insert(states.end(), state.begin(), state.end());
      for (int64_t v = 0; v < width; ++v) {
        bool legal = false;
        for (int64_t r = state[0]; r < state[1]; ++r) legal |= trie.table[r][level] + offset == v;
        if (!legal) expected[row * stride + v] = fill;
      }
    }
    const std::vector<int64_t> columns(trie.depth, offset);
    const auto mask = [&](std::vector<Word>& out) {
      plum::cpu::trie_mask(logits.data(), stride, out.data(), stride, fill, rows, width,
                           states.data(), trie.trie, {level, nullptr}, columns.data(), threads);
    };
    std::vector<Word> other = logits;
    mask(other);
    CHECK(other == expected);
    mask(logits);
    CHECK(logits == expected);
  }
}

}  // namespace

int main() {
  std::mt19937_64 random(1);
  for (const std::string& isa : plum::cpu::available_isas()) {
    plum::cpu::set_isa(isa);
    for (int round = 0; round < 60; ++round) {
      const int64_t size = std::vector<int64_t>{1, 2, 3, 17, 130}[random() % 5];
      const TrieTable trie(1 + random() % 300, 1 + random() % 5, size, random);
      const int threads = 1 + round % 3;
      check_walks(trie, random, threads);
      check_mask<uint32_t>(trie, random, round % 2 * 9, threads);
      check_mask<uint16_t>(trie, random, round % 2 * 9, threads);
    }
    // Few rows keep as many logits as are looked up together.
    check_mask<uint32_t>(TrieTable(900, 1, 20000, random), random, 9, 2);
  }
  std::puts("test_trie_search: ok");
}
