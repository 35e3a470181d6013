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

template <typename Word>
const Masker<Word>& active_masker() {
#ifdef PLUM_X86
  switch (active_isa()) {
    case Isa::kAmxBf16:
    case Isa::kAvx512Bf16:
    case Isa::kAvx512Vnni:
    case Isa::kAvx512:
      return avx512::masker<Word>();
    case Isa::kAvx2:
      return avx2::masker<Word>();
    case Isa::kGeneric:
      break;
  }
#endif
  return generic::masker<Word>();
}

}  // namespace

template <typename Word>
void trie_mask(const Word* logits, int64_t stride, Word* masked, int64_t masked_stride, Word fill,
               int64_t rows, int64_t width, const int64_t* states, const Trie& trie,
               RowLevels levels, const int64_t* columns, int threads) {
  const Masker<Word>& masker = active_masker<Word>();
  const auto depth = static_cast<int64_t>(trie.levels.size());
  const int64_t wanted = std::min(rows, rows * width / kLogitsPerThread);
  const int workers = static_cast<int>(std::clamp<int64_t>(wanted, 1, threads));
  parallel(workers, [&](int worker) {
    std::vector<Word> kept;
    const int64_t end = rows * (worker + 1) / workers;
    for (int64_t i = rows * worker / workers; i < end; ++i) {
      Word* out = masked + i * masked_stride;
      const int64_t l = levels[i];
      if (l < 0 || l >= depth) {
        masker.fill(out, width, fill);
        continue;
      }
      const TrieLevel& level = trie.levels[l];
      const int64_t first = columns[l], last = first + level.size;
      masker.fill(out, first, fill);
      masker.fill(out + last, width - last, fill);
      out += first;
      const Word* row = logits + i * stride + first;
      const Rows range = clamped(trie, states + 2 * i);
      const Node node = node_of(level, range);
      const int64_t count = node.last - node.first;
      const uint64_t* mask =
          count * kSparse < level.size ? nullptr : mask_of(trie, l, range, level.masks);
      if (mask != nullptr) {
        masker.by_bits(row, level.size, mask, fill, out);
      } else {
        kept.resize(std::max<size_t>(count, kept.size()));
        masker.by_codes(row, level.size, level.codes + node.first, count, fill, out, kept.data());
      }
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
