#include "plum/codebook_sums.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <vector>

#include "aligned.h"
#include "parallel.h"
#include "plum/cpu_features.h"

namespace plum::cpu {

#define PLUM_DECLARE(isa)                                                                          \
  namespace isa {                                                                                  \
  void codebook_sums_columns(const void* x, int type, int64_t rows, int64_t width, int64_t first,  \
                             int64_t count, int64_t columns, const int32_t* slots, int64_t levels, \
                             const float* codebooks, double* sums);                                \
  }
PLUM_DECLARE(generic)
#ifdef PLUM_X86
PLUM_DECLARE(avx2)
PLUM_DECLARE(avx512)
#endif
#undef PLUM_DECLARE

namespace {

// Columns are summed in blocks of one of these widths, so that the sums of all codes stay in the
// second-level cache.
constexpr int64_t kNarrow = 32, kWide = 64;
constexpr int64_t kCacheBytes = 1 << 20;
// Below this many elements a thread, starting threads costs more than it saves.
constexpr int64_t kElementsPerThread = 1 << 17;

auto kernel() {
#ifdef PLUM_X86
  if (active_isa() >= Isa::kAvx512) return &avx512::codebook_sums_columns;
  if (active_isa() == Isa::kAvx2) return &avx2::codebook_sums_columns;
#endif
  return &generic::codebook_sums_columns;
}

// Writes offset_l + code for rows [begin, end); returns the first position out of range, or -1.
template <typename Code>
int64_t find_slots(const Code* codes, int64_t begin, int64_t end, int64_t levels,
                   const int64_t* sizes, int32_t* slots) {
  for (int64_t n = begin; n < end; ++n) {
    int64_t offset = 0;
    for (int64_t level = 0; level < levels; ++level) {
      const auto code = static_cast<int64_t>(codes[n * levels + level]);
      if (code < 0 || code >= sizes[level]) return n * levels + level;
      slots[n * levels + level] = static_cast<int32_t>(offset + code);
      offset += sizes[level];
    }
  }
  return -1;
}

int64_t blocks_of(int64_t count, int64_t block) { return (count + block - 1) / block; }

}  // namespace

template <typename Code>
int64_t codebook_sums(const void* x, RowType type, int64_t rows, int64_t width, const Code* codes,
                      int64_t levels, const int64_t* sizes, const float* codebooks, double* sums,
                      int threads) {
  int64_t total = 0;
  for (int64_t level = 0; level < levels; ++level) total += sizes[level];
  const int64_t elements = (rows * levels + total) * width;
  threads = static_cast<int>(std::clamp<int64_t>(elements / kElementsPerThread, 1, threads));

  const std::unique_ptr<int32_t[]> slots(new int32_t[rows * levels]);
  std::vector<int64_t> first_bad(threads);
  parallel(threads, [&](int worker) {
    first_bad[worker] = find_slots(codes, rows * worker / threads, rows * (worker + 1) / threads,
                                   levels, sizes, slots.get());
  });
  for (int64_t bad : first_bad) {
    if (bad >= 0) return bad;
  }

  const int64_t narrow = blocks_of(blocks_of(width, kNarrow), threads);
  const int64_t wide = blocks_of(blocks_of(width, kWide), threads);
  const bool fits = total * kWide * int64_t{sizeof(double) + sizeof(float)} <= kCacheBytes;
  const int64_t block = fits && kWide * wide <= kNarrow * narrow ? kWide : kNarrow;
  const int64_t blocks = blocks_of(width, block);
  const auto add_columns = kernel();
  std::atomic<int64_t> next{0};
  parallel(static_cast<int>(std::min<int64_t>(threads, blocks)), [&](int) {
    // Copies of the block's columns: rows of a power of two of bytes would share few cache lines.
    const auto block_sums = aligned<double>(total * block);
    const auto block_books = aligned<float>(total * block);
    std::memset(block_books.get(), 0, total * block * sizeof(float));
    for (int64_t b = next++; b < blocks; b = next++) {
      const int64_t first = b * block, count = std::min(block, width - first);
      std::memset(block_sums.get(), 0, total * block * sizeof(double));
      for (int64_t k = 0; k < total; ++k) {
        std::memcpy(block_books.get() + k * block, codebooks + k * width + first,
                    count * sizeof(float));
      }
      add_columns(x, static_cast<int>(type), rows, width, first, count, block, slots.get(), levels,
                  block_books.get(), block_sums.get());
      for (int64_t k = 0; k < total; ++k) {
        std::memcpy(sums + k * width + first, block_sums.get() + k * block, count * sizeof(double));
      }
    }
  });
  return -1;
}

template int64_t codebook_sums<int32_t>(const void*, RowType, int64_t, int64_t, const int32_t*,
                                        int64_t, const int64_t*, const float*, double*, int);
template int64_t codebook_sums<int64_t>(const void*, RowType, int64_t, int64_t, const int64_t*,
                                        int64_t, const int64_t*, const float*, double*, int);

}  // namespace plum::cpu
