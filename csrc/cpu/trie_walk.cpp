#include "plum/trie_walk.h"

#include <algorithm>

#include "parallel.h"
#include "trie_search.h"

namespace plum::cpu {
namespace {

constexpr int64_t kPrefixesPerThread = 1 << 10;

// Prefixes walked side by side, level by level: their cache misses overlap.
constexpr int64_t kWalks = 16;

}  // namespace

void trie_walk(const int64_t* roots, const int64_t* prefixes, int64_t count, int64_t length,
               const Trie& trie, int64_t* states, int threads) {
  const int workers = static_cast<int>(std::clamp<int64_t>(count / kPrefixesPerThread, 1, threads));
  parallel(workers, [&](int worker) {
    const int64_t end = count * (worker + 1) / workers;
    for (int64_t begin = count * worker / workers; begin < end; begin += kWalks) {
      const int64_t stop = std::min(begin + kWalks, end);
      std::copy(roots + 2 * begin, roots + 2 * stop, states + 2 * begin);
      bool ended[kWalks] = {};
      for (int64_t l = 0; l < length; ++l) {
        for (int64_t i = begin; i < stop; ++i) {
          const int64_t code = prefixes[i * length + l];
          int64_t* state = states + 2 * i;
          if (code == -1) {
            ended[i - begin] = true;
          } else if (ended[i - begin]) {
            state[0] = state[1] = 0;
          } else {
            advance(trie, trie.levels[l], state, code, state);
          }
        }
      }
    }
  });
}

}  // namespace plum::cpu
