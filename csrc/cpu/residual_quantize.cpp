#include "plum/residual_quantize.h"

#include <algorithm>
#include <atomic>

#include "aligned.h"
#include "parallel.h"
#include "residual_quantize_types.h"

namespace plum::cpu {

#define PLUM_DECLARE(isa)                                                                         \
  namespace isa {                                                                                 \
  int64_t residual_quantize_block(const residual::Problem& problem, int64_t begin, int64_t count, \
                                  int64_t next, float* workspace, int64_t* compared);             \
  }
PLUM_DECLARE(generic)
#ifdef PLUM_X86
PLUM_DECLARE(avx2)
PLUM_DECLARE(avx512)
PLUM_DECLARE(avx512_int16)
PLUM_DECLARE(avx512_int8)
#endif
#ifdef PLUM_BF16
PLUM_DECLARE(avx512_bf16)
PLUM_DECLARE(amx_bf16)
#endif
#undef PLUM_DECLARE

namespace {

using residual::Element;
using residual::kMaxLanes;
using residual::kRowUnit;

// Rows a block: enough to reuse panels from the second-level cache, few enough to stay there.
constexpr int64_t kBlockRows = 3 * kRowUnit;
constexpr int64_t kBlockFloats = 1 << 17;
// A codeword that the int8 screen leaves to compare takes as long as it saves on this many.
constexpr int64_t kScreenedPerCompared = 32;

auto kernel(Isa isa, Element element) {
#ifdef PLUM_X86
  switch (isa) {
#ifdef PLUM_BF16
    case Isa::kAmxBf16:
      return &amx_bf16::residual_quantize_block;
    case Isa::kAvx512Bf16:
      return element == Element::kInt8 ? &avx512_int8::residual_quantize_block
                                       : &avx512_bf16::residual_quantize_block;
#endif
    case Isa::kAvx512Vnni:
      return element == Element::kInt8 ? &avx512_int8::residual_quantize_block
                                       : &avx512_int16::residual_quantize_block;
    case Isa::kAvx512:
      return &avx512::residual_quantize_block;
    case Isa::kAvx2:
      return &avx2::residual_quantize_block;
    default:
      break;
  }
#endif
  static_cast<void>(isa);
  static_cast<void>(element);
  return &generic::residual_quantize_block;
}

// Adds the codes of rows [begin, begin + rows) to `counts`.
void count_codes(const int32_t* codes, int64_t begin, int64_t rows,
                 const std::vector<int64_t>& offsets, std::vector<int64_t>& counts) {
  const auto levels = static_cast<int64_t>(offsets.size());
  const int32_t* code = codes + begin * levels;
  for (int64_t n = 0; n < rows; ++n) {
    for (int64_t level = 0; level < levels; ++level) ++counts[offsets[level] + *code++];
  }
}

}  // namespace

int64_t residual_quantize(const void* x, RowType type, int64_t rows,
                          const PackedCodebooks& codebooks, int32_t* codes, float* norms,
                          float* residual, int64_t* usage, int threads) {
  if (rows == 0) return -1;
  std::vector<int64_t> offsets;
  int64_t offset = 0, distinct = 0, largest = 0;
  for (const PackedCodebooks::Level& level : codebooks.levels_) {
    offsets.push_back(offset);
    offset += static_cast<int64_t>(level.slot.size());
    distinct += static_cast<int64_t>(level.code.size());
  }
  for (const PackedCodebooks::Screen& screen : codebooks.screens_.levels) {
    largest = std::max<int64_t>(largest, screen.panels.size() * sizeof(float));
  }
  const int64_t stride = codebooks.stride_;
  // Panels that stay in the second-level cache need no more rows to share them.
  const int64_t most = largest <= residual::kPanelBytes ? 1 : kBlockRows / kRowUnit;
  const int64_t units = std::clamp<int64_t>(kBlockFloats / (stride * kRowUnit), 1, most);
  const int64_t fair = round_up((rows + threads - 1) / threads, kRowUnit);
  const int64_t block = std::min(units * kRowUnit, fair);
  const int64_t blocks = (rows + block - 1) / block;
  const int workers = static_cast<int>(std::min<int64_t>(blocks, threads));
  std::atomic<int64_t> next{0};
  std::vector<int64_t> first_bad(workers, -1);
  std::vector<std::vector<int64_t>> counts(workers);
  parallel(workers, [&](int worker) {
    // Residual, operand, two scores a lane, its Row and four words for each row.
    constexpr int64_t kRowFloats = sizeof(residual::Row) / sizeof(float) + 4;
    const auto workspace = aligned<float>(block * (2 * stride + 2 * kMaxLanes + kRowFloats));
    if (usage) counts[worker].assign(codebooks.size_, 0);
    const PackedCodebooks::Screens* screens = nullptr;
    std::vector<residual::Level> levels;
    residual::Problem problem{x,
                              static_cast<int>(type),
                              codebooks.width_,
                              stride,
                              nullptr,
                              static_cast<int64_t>(offsets.size()),
                              codes,
                              norms,
                              residual};
    // Blocks are taken in order, so the first bad row is in one already taken.
    int64_t begin = next.fetch_add(block);
    while (begin < rows && first_bad[worker] < 0) {
      const int64_t after = next.fetch_add(block);
      const int64_t count = std::min(block, rows - begin);
      if (screens != &codebooks.active_screens()) {
        screens = &codebooks.active_screens();
        levels = codebooks.kernel_levels(*screens);
        problem.levels = levels.data();
      }
      const auto quantize_block = kernel(codebooks.isa_, screens->element);
      int64_t compared = 0;
      first_bad[worker] = quantize_block(problem, begin, count, after, workspace.get(), &compared);
      if (screens->element == Element::kInt8 &&
          compared * kScreenedPerCompared > distinct * count) {
        codebooks.want_fallback();
      }
      if (first_bad[worker] >= 0) next.store(rows);
      if (usage) count_codes(codes, begin, count, offsets, counts[worker]);
      begin = after;
    }
  });
  int64_t bad = -1;
  for (int64_t row : first_bad) {
    if (row >= 0 && (bad < 0 || row < bad)) bad = row;
  }
  if (usage && bad < 0) {
    for (const std::vector<int64_t>& count : counts) {
      for (int64_t code = 0; code < codebooks.size_; ++code) usage[code] += count[code];
    }
  }
  return bad;
}

}  // namespace plum::cpu
