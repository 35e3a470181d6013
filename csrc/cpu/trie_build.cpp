#include "plum/trie_build.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <tuple>
#include <utility>

#include "trie_search.h"

namespace plum::cpu {
namespace {

// Bits a pass of the radix sort looks at.
constexpr int kDigit = 11;
// Leading bits sorted by radix beyond those that count the items: few SIDs are left equal.
constexpr int kSpareBits = 8;
// Rows whose codes are fetched ahead of their turn.
constexpr int64_t kAhead = 32;

int bits_of(int64_t count) {
  int bits = 0;
  while ((int64_t{1} << bits) < count) ++bits;
  return bits;
}

template <typename Code>
class Sorter {
 public:
  explicit Sorter(const Catalog& catalog)
      : codes_(static_cast<const Code*>(catalog.codes)),
        catalog_(catalog),
        keys_(new uint64_t[catalog.items]),
        other_keys_(new uint64_t[catalog.items]),
        order_(new uint32_t[catalog.items]),
        other_order_(new uint32_t[catalog.items]) {
    // As many leading levels as fit go into the key.
    for (; packed_ < catalog.depth; ++packed_) {
      const int bits = bits_of(catalog.sizes[packed_]);
      if (total_ + bits > 64) break;
      widths_.push_back(bits);
      total_ += bits;
    }
  }

  // Returns -1, or the position of a code that is out of range.
  int64_t sort() {
    const int wanted = std::min(total_, bits_of(catalog_.items) + kSpareBits);
    const int passes = (wanted + kDigit - 1) / kDigit;
    const int sorted = std::min(total_, passes * kDigit);
    const int64_t bad = pack(passes, total_ - sorted);
    if (bad >= 0) return bad;
    for (int pass = 0; pass < passes; ++pass) scatter(pass, total_ - sorted);
    if (sorted < total_ || packed_ < catalog_.depth) sort_equal(total_ - sorted);
    return -1;
  }

  int64_t write(uint16_t* columns, uint32_t* order, int64_t* item_starts) const {
    const int64_t items = catalog_.items, depth = catalog_.depth;
    std::memcpy(order, order_.get(), items * sizeof *order);
    int64_t rows = 0;
    for (int64_t i = 0; i < items; ++i) {
      if (packed_ < depth && i + kAhead < items) __builtin_prefetch(row(order_[i + kAhead]));
      if (i > 0 && keys_[i] == keys_[i - 1] && equal_rest(order_[i], order_[i - 1])) continue;
      item_starts[rows] = i;
      int shift = total_;
      for (int64_t l = 0; l < packed_; ++l) {
        shift -= widths_[l];
        const uint64_t low = (uint64_t{1} << widths_[l]) - 1;
        columns[l * items + rows] = static_cast<uint16_t>(widths_[l] ? keys_[i] >> shift & low : 0);
      }
      const Code* codes = row(order_[i]);
      for (int64_t l = packed_; l < depth; ++l) {
        columns[l * items + rows] = static_cast<uint16_t>(codes[l]);
      }
      ++rows;
    }
    item_starts[rows] = items;
    return rows;
  }

 private:
  const Code* row(int64_t item) const { return codes_ + item * catalog_.depth; }

  int64_t pack(int passes, int low) {
    counts_.assign(passes << kDigit, 0);
    const int64_t depth = catalog_.depth;
    for (int64_t i = 0; i < catalog_.items; ++i) {
      const Code* codes = row(i);
      uint64_t key = 0;
      bool fits = true;
      for (int64_t l = 0; l < depth; ++l) {
        const auto code = static_cast<int64_t>(codes[l]);
        fits &= code >= 0 && code < catalog_.sizes[l];
        if (l < packed_) key = widths_[l] ? key << widths_[l] | static_cast<uint64_t>(code) : key;
      }
      if (!fits) {
        for (int64_t l = 0; l < depth; ++l) {
          const auto code = static_cast<int64_t>(codes[l]);
          if (code < 0 || code >= catalog_.sizes[l]) return i * depth + l;
        }
      }
      keys_[i] = key;
      order_[i] = static_cast<uint32_t>(i);
      for (int pass = 0; pass < passes; ++pass) ++counts_[pass << kDigit | digit(key, pass, low)];
    }
    return -1;
  }

  static uint64_t digit(uint64_t key, int pass, int low) {
    return key >> (low + pass * kDigit) & ((uint64_t{1} << kDigit) - 1);
  }

  void scatter(int pass, int low) {
    int64_t* counts = counts_.data() + (pass << kDigit);
    if (std::find(counts, counts + (1 << kDigit), catalog_.items) != counts + (1 << kDigit)) return;
    std::exclusive_scan(counts, counts + (1 << kDigit), counts, int64_t{0});
    for (int64_t i = 0; i < catalog_.items; ++i) {
      const int64_t at = counts[digit(keys_[i], pass, low)]++;
      other_keys_[at] = keys_[i];
      other_order_[at] = order_[i];
    }
    keys_.swap(other_keys_);
    order_.swap(other_order_);
  }

  // Sorts the items whose keys are equal but for their `low` last bits.
  void sort_equal(int low) {
    std::vector<std::pair<uint64_t, uint32_t>> run;
    const int64_t items = catalog_.items;
    for (int64_t begin = 0, end; begin < items; begin = end) {
      end = begin + 1;
      while (end < items && (keys_[end] ^ keys_[begin]) >> low == 0) ++end;
      if (end - begin < 2) continue;
      run.clear();
      for (int64_t i = begin; i < end; ++i) run.emplace_back(keys_[i], order_[i]);
      std::sort(run.begin(), run.end(), [this](const auto& a, const auto& b) {
        if (a.first != b.first) return a.first < b.first;
        for (int64_t l = packed_; l < catalog_.depth; ++l) {
          const Code x = row(a.second)[l], y = row(b.second)[l];
          if (x != y) return x < y;
        }
        return a.second < b.second;
      });
      for (int64_t i = begin; i < end; ++i) std::tie(keys_[i], order_[i]) = run[i - begin];
    }
  }

  bool equal_rest(int64_t a, int64_t b) const {
    return std::equal(row(a) + packed_, row(a) + catalog_.depth, row(b) + packed_);
  }

  const Code* codes_;
  const Catalog& catalog_;
  // Not vectors: they would be filled with zeros first.
  std::unique_ptr<uint64_t[]> keys_, other_keys_;
  std::unique_ptr<uint32_t[]> order_, other_order_;
  std::vector<int64_t> counts_;
  int64_t packed_ = 0;  // levels in the key
  int total_ = 0;       // bits of the key
  std::vector<int> widths_;
};

template <typename Code>
int64_t sort_as(const Catalog& catalog, uint16_t* columns, uint32_t* order, int64_t* item_starts) {
  Sorter<Code> sorter(catalog);
  const int64_t bad = sorter.sort();
  return bad >= 0 ? -1 - bad : sorter.write(columns, order, item_starts);
}

void set_bit(uint64_t* bits, int64_t at) { bits[at / 64] |= uint64_t{1} << (at % 64); }

}  // namespace

int64_t sort_sids(const Catalog& catalog, uint16_t* columns, uint32_t* order,
                  int64_t* item_starts) {
  switch (catalog.type) {
    case CodeType::kInt64:
      return sort_as<int64_t>(catalog, columns, order, item_starts);
    case CodeType::kInt32:
      return sort_as<int32_t>(catalog, columns, order, item_starts);
    case CodeType::kInt16:
      return sort_as<int16_t>(catalog, columns, order, item_starts);
    case CodeType::kUint16:
      return sort_as<uint16_t>(catalog, columns, order, item_starts);
    case CodeType::kUint8:
      break;
  }
  return sort_as<uint8_t>(catalog, columns, order, item_starts);
}

std::vector<int64_t> count_runs(const SidColumns& table, uint8_t* changes) {
  std::vector<int64_t> counts(table.depth + 1, 0);
  std::memset(changes, static_cast<int>(table.depth), table.rows);
  // From the last level up, so that the first level that changes is written last.
  for (int64_t l = table.depth - 1; l >= 0; --l) {
    const uint16_t* codes = table.codes + l * table.stride;
    const auto level = static_cast<uint8_t>(l);
    for (int64_t r = 1; r < table.rows; ++r)
      changes[r] = codes[r] != codes[r - 1] ? level : changes[r];
  }
  for (int64_t t = 0; t < table.tries; ++t) {
    if (table.roots[t] < table.rows) changes[table.roots[t]] = 0;
  }
  for (int64_t r = 0; r < table.rows; ++r) ++counts[changes[r]];
  counts.pop_back();
  std::partial_sum(counts.begin(), counts.end(), counts.begin());
  return counts;
}

void fill_trie(const SidColumns& table, const uint8_t* changes, const TrieArrays& arrays) {
  for (int64_t l = 0; l < table.depth; ++l) {
    const int64_t* at = arrays.table + l * kTrieFields;
    auto* codes = arrays.codes + at[0];
    const uint16_t* column = table.codes + l * table.stride;
    if (at[1] < 0) {
      std::memcpy(codes, column, table.rows * sizeof *codes);
    } else {
      auto* starts = arrays.starts + at[1];
      auto* begins = arrays.begins + at[2];
      int64_t edge = 0;
      for (int64_t r = 0; r < table.rows; ++r) {
        if (changes[r] > l) continue;
        codes[edge] = column[r];
        starts[edge++] = static_cast<uint32_t>(r);
        set_bit(begins, r);
      }
      starts[edge] = static_cast<uint32_t>(table.rows);
      count_ranks(begins, table.rows, arrays.ranks + at[3]);
    }
    if (at[4] >= 0) {
      auto* mask = arrays.masks + at[4] - at[5];
      for (int64_t r = 0; r < table.rows; ++r) {
        if (changes[r] > l) continue;
        // A node begins where a level before changes, and at the first row.
        if (changes[r] < l || r == 0) mask += at[5];
        set_bit(mask, column[r]);
      }
    }
  }
}

void fill_filter(const Trie& trie, const TrieFilter& filter, const TrieArrays& arrays,
                 uint64_t* masks) {
  for (size_t l = 0; l < trie.levels.size(); ++l) {
    const int64_t at = arrays.table[l * kTrieFields + 4];
    if (at < 0) continue;
    const TrieLevel& level = trie.levels[l];
    const int64_t nodes = l == 0 ? 1 : trie.levels[l - 1].edges;
    for (int64_t n = 0; n < nodes; ++n) {
      const Rows range = l == 0
                             ? Rows{0, trie.rows}
                             : Rows{trie.levels[l - 1].starts[n], trie.levels[l - 1].starts[n + 1]};
      uint64_t* mask = masks + at + n * level.words;
      visit_children(level, node_of(level, range), [&](int64_t code, Rows rows) {
        const int64_t before = rank(filter.bits, filter.ranks, rows.low);
        if (rank(filter.bits, filter.ranks, rows.high) > before) set_bit(mask, code);
      });
    }
  }
}

void count_ranks(const uint64_t* bits, int64_t count, uint32_t* ranks) {
  uint32_t set = 0;
  for (int64_t block = 0; block <= count / kRankBits; ++block) {
    ranks[block] = set;
    const int64_t begin = block * (kRankBits / 64);
    const int64_t end = std::min<int64_t>(begin + kRankBits / 64, (count + 63) / 64);
    for (int64_t word = begin; word < end; ++word) set += __builtin_popcountll(bits[word]);
  }
}

}  // namespace plum::cpu
