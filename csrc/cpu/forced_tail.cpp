#include "plum/forced_tail.h"

#include <algorithm>

#include "parallel.h"
#include "trie_search.h"

namespace plum::cpu {
namespace {

constexpr int64_t kStatesPerThread = 1 << 10;

// States whose codes are fetched level by level: their cache misses overlap.
constexpr int64_t kStates = 16;

}  // namespace

void forced_tail(const int64_t* states, int64_t count, const Trie& trie, int64_t level,
                 int64_t* tail, bool* forced, int threads) {
  const int64_t left = static_cast<int64_t>(trie.levels.size()) - level;
  const int workers = static_cast<int>(std::clamp<int64_t>(count / kStatesPerThread, 1, threads));
  parallel(workers, [&](int worker) {
    const int64_t end = count * (worker + 1) / workers;
    for (int64_t begin = count * worker / workers; begin < end; begin += kStates) {
      const int64_t stop = std::min(begin + kStates, end);
      for (int64_t i = begin; i < stop; ++i) {
        const int64_t row = states[2 * i];
        forced[i] = row >= 0 && row < trie.rows && states[2 * i + 1] == row + 1;
      }
      for (int64_t l = 0; l < left; ++l) {
        const TrieLevel& at = trie.levels[level + l];
        for (int64_t i = begin; i < stop; ++i) {
          const int64_t row = states[2 * i];
          const auto code = [&] { return at.codes[at.starts == nullptr ? row : edge_of(at, row)]; };
          tail[i * left + l] = forced[i] ? code() : -1;
        }
      }
    }
  });
}

}  // namespace plum::cpu
