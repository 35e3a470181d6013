#include "plum/forced_tail.h"

#include <algorithm>

#include "parallel.h"
#include "trie_search.h"

namespace plum::cpu {
namespace {

constexpr int64_t kStatesPerThread = 1 << 10;

}  // namespace

void forced_tail(const int64_t* states, int64_t count, const std::vector<TrieLevel>& levels,
                 int64_t* tail, bool* forced, int threads) {
  const auto depth = static_cast<int64_t>(levels.size());
  const int workers = static_cast<int>(std::clamp<int64_t>(count / kStatesPerThread, 1, threads));
  parallel(workers, [&](int worker) {
    const int64_t end = count * (worker + 1) / workers;
    for (int64_t begin = count * worker / workers; begin < end; begin += kSearches) {
      const int64_t lanes = std::min(kSearches, end - begin);
      for (int64_t i = begin; i < begin + lanes; ++i) {
        forced[i] = states[2 * i + 1] - states[2 * i] == 1;
      }
      for (int64_t l = 0; l < depth; ++l) {
        const TrieLevel& level = levels[l];
        int64_t row[kSearches], edge[kSearches];
        first_edges(level, states + 2 * begin, lanes, row, edge);
        for (int64_t i = 0; i < lanes; ++i) {
          // The edge that holds the row: the one found, or the one before if that starts behind.
          const int64_t holds =
              edge[i] - (edge[i] == level.edges || level.starts[edge[i]] > row[i]);
          tail[(begin + i) * depth + l] = forced[begin + i] ? level.codes[holds] : -1;
        }
      }
    }
  });
}

}  // namespace plum::cpu
