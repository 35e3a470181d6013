// What SidTrie is built from: the sorted table of distinct SIDs, and the arrays of its levels.
#pragma once

#include <cstdint>
#include <vector>

#include "plum/trie_index.h"

namespace plum::cpu {

enum class CodeType : int { kInt64 = 0, kInt32 = 1, kInt16 = 2, kUint16 = 3, kUint8 = 4 };

struct Catalog {
  const void* codes;  // [items, depth], rows without gaps
  CodeType type;
  int64_t items, depth;
  const int64_t* sizes;  // [depth] codes of each level, at most 65,536
};

// Sorts the SIDs of a catalog. Returns how many are distinct, or -1 - i if codes[i] is out of
// range.
//   columns      [depth, items]; the distinct SIDs fill the front of each column
//   order        [items] the items by SID, those of one SID as they came; items < 2^32
//   item_starts  [items + 1] where the items of each SID begin in `order`, closed by their number
int64_t sort_sids(const Catalog& catalog, uint16_t* columns, int64_t* order, int64_t* item_starts);

// A sorted table [depth, rows] of distinct SIDs, `stride` codes from column to column.
struct SidColumns {
  const uint16_t* codes;
  int64_t rows, depth, stride;
  const int64_t* roots;  // [tries + 1] first row of each trie in the table, closed by the rows
  int64_t tries;
};

// Writes to `changes` [rows] the first level whose code differs from the row before, 0 in the first
// row of a trie; returns the number of runs of each level.
std::vector<int64_t> count_runs(const SidColumns& table, uint8_t* changes);

// Fills the arrays of a trie from its table and from what count_runs wrote.
void fill_trie(const SidColumns& table, const uint8_t* changes, const TrieArrays& arrays);

// Fills `masks`, zero before and laid out like the trie's, with its masks less the children below
// which the filter leaves no row.
void fill_filter(const Trie& trie, const TrieFilter& filter, const TrieArrays& arrays,
                 uint64_t* masks);

// Fills `ranks` [bits / 512 + 1] with the set bits before each block of 512.
void count_ranks(const uint64_t* bits, int64_t count, uint32_t* ranks);

}  // namespace plum::cpu
