// A trie of SIDs as SidTrie holds it: columns of the sorted table, and what makes them quick to
// ask.
#pragma once

#include <cstdint>
#include <vector>

namespace plum {

// One level. Rows are those of the sorted table of distinct SIDs; the children of a node are runs
// of equal codes in its range of rows. A *csr* level has one entry a run, a *matrix* level
// (`starts` is null) one a row.
struct TrieLevel {
  // csr: [edges] code of each run; matrix: [rows] column of the table
  const uint16_t* codes;
  // csr: [edges + 1] first row of each run, closed by the number of rows
  const uint32_t* starts;
  // csr: bit r is set where a run begins at row r; and the set bits before each block of 512 rows
  const uint64_t* begins;
  const uint32_t* ranks;
  // [nodes, words] bit c of a node's mask is set if it has a child of code c; or null. Nodes are
  // numbered by the edges of the level before, which is csr.
  const uint64_t* masks;
  int64_t words, edges, size;
};

struct Trie {
  int64_t rows;
  std::vector<TrieLevel> levels;
};

// The level of each of many states: `each` of them where it is not null, else `all`.
struct RowLevels {
  int64_t all;
  const int64_t* each;
  int64_t operator[](int64_t i) const { return each == nullptr ? all : each[i]; }
};

// Rows that may be reached, prepared for one trie.
struct TrieFilter {
  const uint64_t* bits;                // bit r: row r may be reached; null for no filter
  const uint32_t* ranks;               // set bits before each block of 512 rows
  std::vector<const uint64_t*> masks;  // of each level: its masks without children that hold no row
};

// The arrays of SidTrie, all levels one behind the other, and where each begins. A row of `table`
// is codes_at, starts_at, begins_at, ranks_at, masks_at, words, edges, size, rows; -1 for what is
// not there.
constexpr int64_t kTrieFields = 9;

struct TrieArrays {
  const int64_t* table;
  int64_t depth, rows;
  uint16_t* codes;
  uint32_t* starts;
  uint64_t* begins;
  uint32_t* ranks;
  uint64_t* masks;
};

Trie make_trie(const TrieArrays& arrays);

// The same for a filter: `masks` are laid out like those of the trie.
TrieFilter make_filter(const TrieArrays& arrays, const uint64_t* bits, const uint32_t* ranks,
                       const uint64_t* masks);

}  // namespace plum
