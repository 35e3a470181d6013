#include "plum/code_usage.h"

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "plum/cpu_features.h"

namespace plum::cpu {

#define PLUM_DECLARE(isa)                                                                          \
  namespace isa {                                                                                  \
  template <typename Code>                                                                         \
  int64_t count_rows(const Code* codes, int64_t begin, int64_t end, int64_t levels,                \
                     int64_t repeat, const uint32_t* offset, const uint32_t* size, uint32_t total, \
                     uint32_t* histogram);                                                         \
  }
PLUM_DECLARE(generic)
#ifdef PLUM_X86
PLUM_DECLARE(avx2)
PLUM_DECLARE(avx512)
#endif
#undef PLUM_DECLARE

namespace {

// As kBlock in the kernel: the rows that fill one block of slots.
constexpr int64_t kBlockCodes = 4096;
// Below this many codes a thread, starting threads costs more than it saves.
constexpr int64_t kCodesPerThread = 1 << 16;
// A histogram's 32-bit slots are flushed before they can overflow.
constexpr int64_t kRowsPerFlush = int64_t{1} << 31;

template <typename Code>
auto kernel() {
#ifdef PLUM_X86
  if (active_isa() >= Isa::kAvx512) return &avx512::count_rows<Code>;
  if (active_isa() == Isa::kAvx2) return &avx2::count_rows<Code>;
#endif
  return &generic::count_rows<Code>;
}

}  // namespace

template <typename Code>
int64_t code_usage(const Code* codes, int64_t rows, int64_t levels, const int64_t* sizes,
                   int64_t* usage, int threads) {
  if (rows == 0 || levels == 0) return -1;
  const int64_t repeat = std::max<int64_t>(1, kBlockCodes / levels);
  std::vector<uint32_t> offset(repeat * levels), size(repeat * levels);
  uint32_t total = 0;
  for (int64_t level = 0; level < levels; ++level) {
    for (int64_t r = 0; r < repeat; ++r) {
      offset[r * levels + level] = total;
      size[r * levels + level] = static_cast<uint32_t>(sizes[level]);
    }
    total += static_cast<uint32_t>(sizes[level]);
  }
  const auto count_rows = kernel<Code>();
  const int workers =
      static_cast<int>(std::clamp<int64_t>(rows * levels / kCodesPerThread, 1, threads));
  std::vector<std::vector<int64_t>> sums(workers);
  std::vector<int64_t> first_bad(workers, -1);
  parallel(workers, [&](int worker) {
    std::vector<uint32_t> histogram(2 * (size_t{total} + 1), 0);
    std::vector<int64_t>& sum = sums[worker];
    sum.assign(total, 0);
    const int64_t end = rows * (worker + 1) / workers;
    for (int64_t begin = rows * worker / workers; begin < end; begin += kRowsPerFlush) {
      const int64_t bad = count_rows(codes, begin, std::min(end, begin + kRowsPerFlush), levels,
                                     repeat, offset.data(), size.data(), total, histogram.data());
      if (first_bad[worker] < 0) first_bad[worker] = bad;
      for (uint32_t slot = 0; slot < total; ++slot) {
        sum[slot] += int64_t{histogram[slot]} + histogram[total + 1 + slot];
      }
      std::fill(histogram.begin(), histogram.end(), 0);
    }
  });
  int64_t bad = -1;
  for (int worker = workers - 1; worker >= 0; --worker) {
    for (uint32_t slot = 0; slot < total; ++slot) usage[slot] += sums[worker][slot];
    if (first_bad[worker] >= 0) bad = first_bad[worker];
  }
  return bad;
}

template int64_t code_usage<int32_t>(const int32_t*, int64_t, int64_t, const int64_t*, int64_t*,
                                     int);
template int64_t code_usage<int64_t>(const int64_t*, int64_t, int64_t, const int64_t*, int64_t*,
                                     int);

}  // namespace plum::cpu
