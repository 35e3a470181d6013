#include "plum/trie_walk.h"

#include <algorithm>

#include "parallel.h"
#include "trie_search.h"

namespace plum::cpu {
namespace {

constexpr int64_t kPrefixesPerThread = 1 << 10;

}  // namespace

void trie_walk(const int64_t* prefixes, int64_t count, int64_t length,
               const std::vector<TrieLevel>& levels, int64_t* states, int threads) {
  const int64_t rows = levels[0].starts[levels[0].edges];
  const int workers = static_cast<int>(std::clamp<int64_t>(count / kPrefixesPerThread, 1, threads));
  parallel(workers, [&](int worker) {
    const int64_t end = count * (worker + 1) / workers;
    for (int64_t begin = count * worker / workers; begin < end; begin += kSearches) {
      const int64_t lanes = std::min(kSearches, end - begin);
      int64_t* state = states + 2 * begin;
      bool ended[kSearches] = {};
      for (int64_t i = 0; i < lanes; ++i) {
        state[2 * i] = 0;
        state[2 * i + 1] = rows;
      }
      for (int64_t l = 0; l < length; ++l) {
        int64_t tokens[kSearches], after[2 * kSearches];
        for (int64_t i = 0; i < lanes; ++i) tokens[i] = prefixes[(begin + i) * length + l];
        advance(levels[l], state, tokens, lanes, after);
        for (int64_t i = 0; i < lanes; ++i) {
          if (tokens[i] == -1) {
            ended[i] = true;
          } else {
            state[2 * i] = ended[i] ? 0 : after[2 * i];
            state[2 * i + 1] = ended[i] ? 0 : after[2 * i + 1];
          }
        }
      }
    }
  });
}

}  // namespace plum::cpu
