#include "plum/trie_mask.h"

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "plum/cpu_features.h"
#include "trie_mask_types.h"
#include "trie_search.h"

namespace plum::cpu {

#define PLUM_DECLARE(isa)       \
  namespace isa {               \
  template <typename Word>      \
  const Masker<Word>& masker(); \
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
// A node with a mask is masked by it if it holds at least one row in so many columns.
constexpr int64_t kSparse = 16;
// Rows whose nodes and legal logits are looked up before any is written, so that waits for memory
// overlap; fewer once so many logits are kept.
constexpr int kTogether = 16;
constexpr int64_t kMostKept = 4096;

template <typename Word>
const Masker<Word>& active_masker() {
#ifdef PLUM_X86
  if (active_isa() >= Isa::kAvx512) return avx512::masker<Word>();
  if (active_isa() == Isa::kAvx2) return avx2::masker<Word>();
#endif
  return generic::masker<Word>();
}

// What is legal in a row: no column, the bits of a mask, or `count` codes that rise; a code may be
// there several times.
struct Legal {
  int64_t first, size;  // the columns of the level
  const uint64_t* mask;
  const uint16_t* codes;
  int64_t count;
};

Legal legal_of(const Trie& trie, int64_t l, const int64_t* state, const int64_t* columns) {
  if (l < 0 || l >= static_cast<int64_t>(trie.levels.size())) return {};
  const TrieLevel& level = trie.levels[l];
  const Rows range = clamped(trie, state);
  const Node node = node_of(level, range);
  const int64_t count = node.last - node.first;
  const uint64_t* mask =
      count * kSparse < level.size ? nullptr : mask_of(trie, l, range, level.masks);
  const uint16_t* codes = level.codes + node.first;
  __builtin_prefetch(codes);
  return {columns[l], level.size, mask, codes, mask == nullptr ? count : 0};
}

}  // namespace

template <typename Word>
void trie_mask(const Word* logits, int64_t stride, Word* masked, int64_t masked_stride, Word fill,
               int64_t rows, int64_t width, const int64_t* states, const Trie& trie,
               RowLevels levels, const int64_t* columns, int threads) {
  const Masker<Word>& masker = active_masker<Word>();
  const int64_t wanted = std::min(rows, rows * width / kLogitsPerThread);
  const int workers = static_cast<int>(std::clamp<int64_t>(wanted, 1, threads));
  parallel(workers, [&](int worker) {
    std::vector<Word> kept;
    Legal legal[kTogether];
    const int64_t end = rows * (worker + 1) / workers;
    for (int64_t i = rows * worker / workers; i < end;) {
      int together = 0;
      int64_t total = 0;
      for (; together < kTogether && i + together < end && total < kMostKept; ++together) {
        const int64_t at = i + together;
        legal[together] = legal_of(trie, levels[at], states + 2 * at, columns);
        total += legal[together].count;
      }
      // Where rows are masked in place, filling them loses what they keep.
      if (static_cast<int64_t>(kept.size()) < total) kept.resize(total);
      Word* keep = kept.data();
      for (int j = 0; j < together; ++j) {
        const Word* row = logits + (i + j) * stride + legal[j].first;
        for (int64_t k = 0; k < legal[j].count; ++k) *keep++ = row[legal[j].codes[k]];
      }
      const Word* from = kept.data();
      for (int j = 0; j < together; ++j) {
        const auto& [first, size, mask, codes, count] = legal[j];
        Word* out = masked + (i + j) * masked_stride;
        if (mask != nullptr) {
          masker.fill(out, first, fill);
          masker.by_bits(logits + (i + j) * stride + first, size, mask, fill, out + first);
          masker.fill(out + first + size, width - first - size, fill);
          continue;
        }
        masker.fill(out, width, fill);
        for (int64_t k = 0; k < count; ++k) out[first + codes[k]] = *from++;
      }
      i += together;
    }
  });
}

template void trie_mask<uint32_t>(const uint32_t*, int64_t, uint32_t*, int64_t, uint32_t, int64_t,
                                  int64_t, const int64_t*, const Trie&, RowLevels, const int64_t*,
                                  int);
template void trie_mask<uint16_t>(const uint16_t*, int64_t, uint16_t*, int64_t, uint16_t, int64_t,
                                  int64_t, const int64_t*, const Trie&, RowLevels, const int64_t*,
                                  int);

}  // namespace plum::cpu
