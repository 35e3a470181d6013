// A random table of distinct SIDs in order, and its trie with levels laid out at random.
#pragma once

#include <algorithm>
#include <cstdint>
#include <random>
#include <vector>

#include "check.h"
#include "plum/trie_build.h"

struct TrieTable {
  TrieTable(int64_t items, int64_t levels_wanted, int64_t codes, std::mt19937_64& random)
      : depth(levels_wanted), size(codes) {
    std::vector<int32_t> catalog;
    for (int64_t i = 0; i < items; ++i) {
      std::vector<int64_t> sid(depth);
      for (int64_t& code : sid) code = random() % size;
      catalog.insert(catalog.end(), sid.begin(), sid.end());
      table.push_back(sid);
    }
    const auto all = table;
    std::sort(table.begin(), table.end());
    table.erase(std::unique(table.begin(), table.end()), table.end());
    rows = static_cast<int64_t>(table.size());
    check_sort(catalog, all);
    build(random);
  }

  // The range of rows that begin with the first `length` codes of a SID.
  std::vector<int64_t> range_of(const std::vector<int64_t>& prefix) const {
    const auto has_prefix = [&](const std::vector<int64_t>& sid) {
      return std::equal(prefix.begin(), prefix.end(), sid.begin());
    };
    const auto first = std::find_if(table.begin(), table.end(), has_prefix);
    if (first == table.end()) return {0, 0};
    const auto last = std::find_if_not(first, table.end(), has_prefix);
    return {first - table.begin(), last - table.begin()};
  }

  // A filter of the rows whose flag is set.
  plum::TrieFilter filter(const std::vector<bool>& flags, std::vector<uint64_t>& bits,
                          std::vector<uint32_t>& bit_ranks, std::vector<uint64_t>& masked) const {
    bits.assign(blocks() * 8, 0);
    for (int64_t r = 0; r < rows; ++r) bits[r / 64] |= uint64_t{flags[r]} << (r % 64);
    bit_ranks.assign(blocks(), 0);
    masked.assign(masks.size(), 0);
    plum::cpu::count_ranks(bits.data(), rows, bit_ranks.data());
    const auto made = plum::make_filter(arrays, bits.data(), bit_ranks.data(), masked.data());
    plum::cpu::fill_filter(trie, made, arrays, masked.data());
    return made;
  }

  int64_t blocks() const { return rows / 512 + 1; }

  int64_t depth, size, rows;
  std::vector<std::vector<int64_t>> table;
  plum::TrieArrays arrays{};
  plum::Trie trie;

 private:
  void check_sort(const std::vector<int32_t>& catalog,
                  const std::vector<std::vector<int64_t>>& all) {
    const auto items = static_cast<int64_t>(all.size());
    const std::vector<int64_t> sizes(depth, size);
    columns.assign(depth * items, 0);
    std::vector<int64_t> order(items);
    std::vector<int64_t> starts_of_items(items + 1);
    const plum::cpu::Catalog input{catalog.data(), plum::cpu::CodeType::kInt32, items, depth,
                                   sizes.data()};
    CHECK(plum::cpu::sort_sids(input, columns.data(), order.data(), starts_of_items.data()) ==
          rows);
    stride = items;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = starts_of_items[r]; i < starts_of_items[r + 1]; ++i) {
        CHECK(all[order[i]] == table[r]);
        CHECK(i == starts_of_items[r] || order[i - 1] < order[i]);
      }
      for (int64_t l = 0; l < depth; ++l) CHECK(columns[l * stride + r] == table[r][l]);
    }
    CHECK(starts_of_items[rows] == items);
    std::vector<int32_t> bad = catalog;
    bad[bad.size() / 2] = static_cast<int32_t>(size);
    const plum::cpu::Catalog wrong{bad.data(), plum::cpu::CodeType::kInt32, items, depth,
                                   sizes.data()};
    CHECK(plum::cpu::sort_sids(wrong, columns.data(), order.data(), starts_of_items.data()) ==
          -1 - static_cast<int64_t>(bad.size() / 2));
    plum::cpu::sort_sids(input, columns.data(), order.data(), starts_of_items.data());
  }

  void build(std::mt19937_64& random) {
    const std::vector<int64_t> roots{0, rows};
    const plum::cpu::SidColumns input{columns.data(), rows, depth, stride, roots.data(), 1};
    std::vector<uint8_t> changes(rows);
    const auto runs = plum::cpu::count_runs(input, changes.data());
    const int64_t words = (size + 63) / 64;
    int64_t at[5] = {};
    const auto take = [&](int array, int64_t count) {
      fields.push_back(at[array]);
      at[array] += count;
    };
    bool csr = true;
    for (int64_t l = 0; l < depth; ++l) {
      const bool numbered = csr;
      csr = random() % 2;
      take(0, csr ? runs[l] : rows);
      if (csr) {
        take(1, runs[l] + 1);
        take(2, blocks() * 8);
        take(3, blocks());
      } else {
        fields.insert(fields.end(), {-1, -1, -1});
      }
      if (numbered && random() % 3) {
        take(4, words * (l == 0 ? 1 : runs[l - 1]));
      } else {
        fields.push_back(-1);
      }
      fields.insert(fields.end(), {words, runs[l], size, rows});
    }
    codes.assign(at[0], 0);
    starts.assign(at[1], 0);
    begins.assign(at[2], 0);
    ranks.assign(at[3], 0);
    masks.assign(at[4], 0);
    arrays = {fields.data(), depth,         rows,         codes.data(),
              starts.data(), begins.data(), ranks.data(), masks.data()};
    plum::cpu::fill_trie(input, changes.data(), arrays);
    trie = plum::make_trie(arrays);
  }

  int64_t stride = 0;
  std::vector<int64_t> fields;
  std::vector<uint16_t> columns, codes;
  std::vector<uint32_t> starts, ranks;
  std::vector<uint64_t> begins, masks;
};
