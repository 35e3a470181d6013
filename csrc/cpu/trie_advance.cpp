#include "plum/trie_advance.h"

#include <algorithm>

#include "parallel.h"
#include "trie_search.h"

namespace plum::cpu {
namespace {

constexpr int64_t kStatesPerThread = 1 << 12;

}  // namespace

void trie_advance(const int64_t* states, const int64_t* tokens, int64_t count, const Trie& trie,
                  RowLevels levels, int64_t* after, int threads) {
  const auto depth = static_cast<int64_t>(trie.levels.size());
  const int workers = static_cast<int>(std::clamp<int64_t>(count / kStatesPerThread, 1, threads));
  parallel(workers, [&](int worker) {
    const int64_t end = count * (worker + 1) / workers;
    for (int64_t i = count * worker / workers; i < end; ++i) {
      const int64_t level = levels[i];
      if (level < 0 || level >= depth) {
        after[2 * i] = after[2 * i + 1] = 0;
      } else {
        advance(trie, trie.levels[level], states + 2 * i, tokens[i], after + 2 * i);
      }
    }
  });
}

}  // namespace plum::cpu
