#include "plum/trie_advance.h"

#include <algorithm>

#include "parallel.h"
#include "trie_search.h"

namespace plum::cpu {
namespace {

constexpr int64_t kStatesPerThread = 1 << 12;

}  // namespace

void trie_advance(const int64_t* states, const int64_t* tokens, int64_t count,
                  const TrieLevel& level, int64_t* after, int threads) {
  const int workers = static_cast<int>(std::clamp<int64_t>(count / kStatesPerThread, 1, threads));
  parallel(workers, [&](int worker) {
    const int64_t end = count * (worker + 1) / workers;
    for (int64_t begin = count * worker / workers; begin < end; begin += kSearches) {
      const int64_t lanes = std::min(kSearches, end - begin);
      advance(level, states + 2 * begin, tokens + begin, lanes, after + 2 * begin);
    }
  });
}

}  // namespace plum::cpu
