#include "plum/trie_mask.h"

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "plum/cpu_features.h"
#include "trie_search.h"

namespace plum::cpu {

#define PLUM_DECLARE(isa)                                                                  \
  namespace isa {                                                                          \
  template <typename Word>                                                                 \
  void mask_row(Word* row, int64_t width, int64_t offset, Word fill, const int32_t* codes, \
                int64_t count, Word* kept, uint8_t* legal);                                \
  }
PLUM_DECLARE(generic)
#ifdef PLUM_X86
PLUM_DECLARE(avx2)
PLUM_DECLARE(avx512)
#endif
#undef PLUM_DECLARE

namespace {

// Below this many logits a thread, starting threads costs more than it saves.
constexpr int64_t kLogitsPerThread = 1 << 17;

template <typename Word>
auto kernel() {
#ifdef PLUM_X86
  switch (active_isa()) {
    case Isa::kAmxBf16:
    case Isa::kAvx512Bf16:
    case Isa::kAvx512:
      return &avx512::mask_row<Word>;
    case Isa::kAvx2:
      return &avx2::mask_row<Word>;
    case Isa::kGeneric:
      break;
  }
#endif
  return &generic::mask_row<Word>;
}

}  // namespace

template <typename Word>
void trie_mask(Word* logits, Word fill, int64_t rows, int64_t width, int64_t stride,
               const int64_t* states, const TrieLevel& level, int64_t offset, int threads) {
  const auto mask_row = kernel<Word>();
  const int64_t wanted = std::min(rows, rows * width / kLogitsPerThread);
  const int workers = static_cast<int>(std::clamp<int64_t>(wanted, 1, threads));
  parallel(workers, [&](int worker) {
    std::vector<Word> kept(width);
    std::vector<uint8_t> legal(width, 0);
    const int64_t end = rows * (worker + 1) / workers;
    for (int64_t begin = rows * worker / workers; begin < end; begin += kSearches) {
      const int64_t count = std::min(kSearches, end - begin);
      int64_t first[kSearches], last[kSearches];
      child_ranges(level, states + 2 * begin, count, first, last);
      for (int64_t i = 0; i < count; ++i) {
        Word* row = logits + (begin + i) * stride;
        const int64_t children = last[i] - first[i];
        mask_row(row, width, offset, fill, level.codes + first[i], children, kept.data(),
                 legal.data());
      }
    }
  });
}

template void trie_mask<uint32_t>(uint32_t*, uint32_t, int64_t, int64_t, int64_t, const int64_t*,
                                  const TrieLevel&, int64_t, int);
template void trie_mask<uint16_t>(uint16_t*, uint16_t, int64_t, int64_t, int64_t, const int64_t*,
                                  const TrieLevel&, int64_t, int);

}  // namespace plum::cpu
