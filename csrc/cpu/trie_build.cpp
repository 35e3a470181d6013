#include "plum/trie_build.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

#include "trie_search.h"

namespace plum::cpu {
namespace {

// Bits that a pass of the radix sort looks at, at most.
constexpr int kDigit = 11;
// Entries of a bucket that are sorted by comparisons.
constexpr int64_t kFew = 192;
// Leading bits sorted by radix beyond those that count the items: few SIDs are left equal.
constexpr int kSpareBits = 8;
// Rows that count_runs looks at together.
constexpr int64_t kBlock = 1 << 13;
// Rows whose codes are fetched ahead of their turn.
constexpr int64_t kAhead = 32;

int bits_of(int64_t count) {
  int bits = 0;
  while ((int64_t{1} << bits) < count) ++bits;
  return bits;
}

// Sorts numbers of 64 bits, one an item: the first bits of its SID, then the item.
template <typename Code>
class Sorter {
 public:
  // `order` and `item_starts` hold the entries until they are written: new pages would cost more
  // than sorting does.
  Sorter(const Catalog& catalog, int64_t* order, int64_t* item_starts)
      : codes_(static_cast<const Code*>(catalog.codes)),
        catalog_(catalog),
        entries_(reinterpret_cast<uint64_t*>(order)),
        other_entries_(reinterpret_cast<uint64_t*>(item_starts)),
        item_bits_(bits_of(catalog.items)) {
    for (int64_t l = 0; l < catalog.depth; ++l) {
      const int width = bits_of(catalog.sizes[l]), left = 64 - item_bits_ - sid_bits_;
      widths_.push_back(width);
      if (left == 0) continue;
      // Of the first level that does not fit only the first bits are taken.
      shifts_.push_back(std::max(width - left, 0));
      sid_bits_ += std::min(width, left);
      whole_ += width <= left;
    }
  }

  // Returns -1, or the position of a code that is out of range.
  int64_t sort() {
    const int wanted = std::min(sid_bits_, item_bits_ + kSpareBits);
    passes_ = (wanted + kDigit - 1) / kDigit;
    // Of a bucket of few entries counting digits takes longer than moving them, so its digits are
    // no wider than they must be.
    if (passes_ > 1) digit_ = (wanted - kDigit + passes_ - 2) / (passes_ - 1);
    // The bits behind those that are looked at.
    low_ = item_bits_ + std::max(sid_bits_ - kDigit - (passes_ - 1) * digit_, 0);
    const int64_t bad = pack();
    if (bad >= 0) return bad;
    // A digit that all items share sorts nothing.
    int top = passes_ - 1;
    while (top >= 0 && !count_digits(entries_, catalog_.items, top)) --top;
    if (top >= 0) sort_buckets(top);
    if (low_ > item_bits_ || whole_ < catalog_.depth) sort_equal();
    return -1;
  }

  int64_t write(uint16_t* columns, int64_t* order, int64_t* item_starts) const {
    const int64_t items = catalog_.items, depth = catalog_.depth;
    int64_t rows = 0;
    uint64_t before = 0;
    for (int64_t i = 0; i < items; ++i) {
      if (whole_ < depth && i + kAhead < items) {
        const Code* ahead = row(entries_[i + kAhead]);
        __builtin_prefetch(ahead + whole_);
        __builtin_prefetch(ahead + depth - 1);
      }
      const uint64_t entry = entries_[i], last = std::exchange(before, entry);
      // Here and at `rows`, which is not beyond, no entry is read again.
      order[i] = item(entry);
      if (i > 0 && (entry ^ last) >> item_bits_ == 0 && equal_rest(entry, last)) continue;
      item_starts[rows] = i;
      int shift = item_bits_ + sid_bits_;
      for (int64_t l = 0; l < whole_; ++l) {
        shift -= widths_[l];
        const uint64_t mask = (uint64_t{1} << widths_[l]) - 1;
        columns[l * items + rows] = static_cast<uint16_t>(widths_[l] ? entry >> shift & mask : 0);
      }
      for (int64_t l = whole_; l < depth; ++l) {
        columns[l * items + rows] = static_cast<uint16_t>(row(entry)[l]);
      }
      ++rows;
    }
    item_starts[rows] = items;
    return rows;
  }

 private:
  int64_t item(uint64_t entry) const {
    return static_cast<int64_t>(entry & ((uint64_t{1} << item_bits_) - 1));
  }

  const Code* row(uint64_t entry) const { return codes_ + item(entry) * catalog_.depth; }

  int64_t pack() {
    const int64_t depth = catalog_.depth, packed = static_cast<int64_t>(shifts_.size());
    // Without a sign: a negative code is a large one.
    const std::vector<uint64_t> sizes(catalog_.sizes, catalog_.sizes + depth);
    for (int64_t i = 0; i < catalog_.items; ++i) {
      const Code* codes = codes_ + i * depth;
      uint64_t entry = 0;
      bool fits = true;
      for (int64_t l = 0; l < packed; ++l) {
        const auto code = static_cast<uint64_t>(codes[l]);
        fits &= code < sizes[l];
        entry = entry << (widths_[l] - shifts_[l]) | code >> shifts_[l];
      }
      for (int64_t l = packed; l < depth; ++l) fits &= static_cast<uint64_t>(codes[l]) < sizes[l];
      if (!fits) return i * depth + first_bad(codes);
      entries_[i] = entry << item_bits_ | static_cast<uint64_t>(i);
    }
    return -1;
  }

  int64_t first_bad(const Code* codes) const {
    int64_t l = 0;
    while (static_cast<uint64_t>(codes[l]) < static_cast<uint64_t>(catalog_.sizes[l])) ++l;
    return l;
  }

  // The bits of an entry that a pass looks at.
  struct Digit {
    int shift;
    uint64_t mask;
    uint64_t operator()(uint64_t entry) const { return entry >> shift & mask; }
  };

  Digit digit(int pass) const {
    const int bits = pass == passes_ - 1 ? kDigit : digit_;
    return {low_ + pass * digit_, (uint64_t{1} << bits) - 1};
  }

  // Counts the digits of some entries; returns whether there are several.
  bool count_digits(const uint64_t* entries, int64_t count, int pass) {
    const Digit of = digit(pass);
    counts_.assign(of.mask + 1, 0);
    for (int64_t i = 0; i < count; ++i) ++counts_[of(entries[i])];
    return count > 0 && counts_[of(entries[0])] < count;
  }

  // Sorts by the digits up to `top`: by the highest into buckets, of which most fit in a cache, and
  // each of these by the others, from the lowest on.
  void sort_buckets(int top) {
    scatter(entries_, other_entries_, catalog_.items, top);
    const std::vector<int64_t> ends = counts_;
    int64_t begin = 0;
    for (int64_t end : ends) {
      const int64_t count = end - begin;
      uint64_t *from = other_entries_ + begin, *to = entries_ + begin;
      begin = end;
      if (count <= kFew) {
        std::sort(from, from + count);
        if (top % 2 == 1) std::copy(from, from + count, to);
        continue;
      }
      for (int pass = 0; pass < top; ++pass) {
        count_digits(from, count, pass);
        scatter(from, to, count, pass);
        std::swap(from, to);
      }
    }
    if (top % 2 == 0) std::swap(entries_, other_entries_);
  }

  // Moves entries to where their digits, which are counted, belong; the counts become the ends.
  void scatter(const uint64_t* from, uint64_t* to, int64_t count, int pass) {
    const Digit of = digit(pass);
    std::exclusive_scan(counts_.begin(), counts_.end(), counts_.begin(), int64_t{0});
    for (int64_t i = 0; i < count; ++i) to[counts_[of(from[i])]++] = from[i];
  }

  // Sorts the items whose entries are equal but for their `low_` last bits.
  void sort_equal() {
    const int64_t items = catalog_.items;
    for (int64_t begin = 0, end; begin < items; begin = end) {
      end = begin + 1;
      while (end < items && (entries_[end] ^ entries_[begin]) >> low_ == 0) ++end;
      if (end - begin < 2) continue;
      std::sort(entries_ + begin, entries_ + end, [this](uint64_t a, uint64_t b) {
        if ((a ^ b) >> item_bits_ == 0) {
          for (int64_t l = whole_; l < catalog_.depth; ++l) {
            const Code x = row(a)[l], y = row(b)[l];
            if (x != y) return x < y;
          }
        }
        return a < b;
      });
    }
  }

  bool equal_rest(uint64_t a, uint64_t b) const {
    return std::equal(row(a) + whole_, row(a) + catalog_.depth, row(b) + whole_);
  }

  const Code* codes_;
  const Catalog& catalog_;
  uint64_t *entries_, *other_entries_;
  std::vector<int64_t> counts_;
  int item_bits_;
  int passes_ = 0, digit_ = 0, low_ = 0;  // bits of all digits but the first, and bits behind them
  int sid_bits_ = 0;                      // bits of the SID in an entry
  int64_t whole_ = 0;                     // levels that are in an entry with all their bits
  std::vector<int> widths_;
  std::vector<int> shifts_;  // last bits that an entry lacks, of the levels in it
};

template <typename Code>
int64_t sort_as(const Catalog& catalog, uint16_t* columns, int64_t* order, int64_t* item_starts) {
  Sorter<Code> sorter(catalog, order, item_starts);
  const int64_t bad = sorter.sort();
  return bad >= 0 ? -1 - bad : sorter.write(columns, order, item_starts);
}

void set_bit(uint64_t* bits, int64_t at) { bits[at / 64] |= uint64_t{1} << (at % 64); }

}  // namespace

int64_t sort_sids(const Catalog& catalog, uint16_t* columns, int64_t* order, int64_t* item_starts) {
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
  // By blocks that stay in the cache from level to level.
  for (int64_t begin = 0, end; begin < table.rows; begin = end) {
    end = std::min(begin + kBlock, table.rows);
    std::memset(changes + begin, static_cast<int>(table.depth), end - begin);
    // From the last level up, so that the first level that changes is written last.
    for (int64_t l = table.depth - 1; l >= 0; --l) {
      const uint16_t* codes = table.codes + l * table.stride;
      const auto level = static_cast<uint8_t>(l);
      for (int64_t r = std::max<int64_t>(begin, 1); r < end; ++r)
        changes[r] = codes[r] != codes[r - 1] ? level : changes[r];
    }
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
      int64_t mask = at[4] - at[5];
      for (int64_t r = 0; r < table.rows; ++r) {
        // A node begins where a level before changes, and at the first row. A code that comes again
        // sets its bit again: to see that it does would take longer.
        if (changes[r] < l || r == 0) mask += at[5];
        set_bit(arrays.masks + mask, column[r]);
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
