#include "plum/residual_quantize.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <string_view>
#include <unordered_map>

#include "aligned.h"
#include "parallel.h"
#include "residual_quantize_types.h"

namespace plum::cpu {

#define PLUM_DECLARE(isa)                                                                         \
  namespace isa {                                                                                 \
  int64_t residual_quantize_block(const residual::Problem& problem, int64_t begin, int64_t count, \
                                  int64_t next, float* workspace);                                \
  }
PLUM_DECLARE(generic)
#ifdef PLUM_X86
PLUM_DECLARE(avx2)
PLUM_DECLARE(avx512)
PLUM_DECLARE(avx512_vnni)
#endif
#ifdef PLUM_BF16
PLUM_DECLARE(avx512_bf16)
PLUM_DECLARE(amx_bf16)
#endif
#undef PLUM_DECLARE

namespace {

using residual::kMaxLanes;
using residual::kRowUnit;
using residual::kStrideUnit;

// Rows a block: enough to reuse panels from the second-level cache, few enough to stay there.
constexpr int64_t kBlockRows = 3 * kRowUnit;
constexpr int64_t kBlockFloats = 1 << 17;
// Beyond this width the error bound of the screen does not hold, so it is not trusted.
constexpr int64_t kMaxScreenWidth = 1 << 21;

enum class Element { kFp32, kBf16, kInt16 };

// How an instruction set's screen reads codewords.
struct Layout {
  int64_t lanes;
  Element element;
  int64_t apart;  // dimensions from one to the other of a pair
};

Layout layout(Isa isa) {
  switch (isa) {
    case Isa::kAmxBf16:
      return {32, Element::kBf16, 16};
    case Isa::kAvx512Bf16:
      return {64, Element::kBf16, 16};
    case Isa::kAvx512Vnni:
      return {64, Element::kInt16, 16};
    case Isa::kAvx2:
      return {64, Element::kInt16, 8};
    default:
      return {64, Element::kFp32, 0};
  }
}

auto kernel(Isa isa) {
#ifdef PLUM_X86
  switch (isa) {
#ifdef PLUM_BF16
    case Isa::kAmxBf16:
      return &amx_bf16::residual_quantize_block;
    case Isa::kAvx512Bf16:
      return &avx512_bf16::residual_quantize_block;
#endif
    case Isa::kAvx512Vnni:
      return &avx512_vnni::residual_quantize_block;
    case Isa::kAvx512:
      return &avx512::residual_quantize_block;
    case Isa::kAvx2:
      return &avx2::residual_quantize_block;
    default:
      break;
  }
#endif
  static_cast<void>(isa);
  return &generic::residual_quantize_block;
}

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Rounds to the nearest bf16, ties to even.
uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float from_bf16(uint16_t half) {
  const uint32_t bits = uint32_t{half} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The step of int16 codewords: their elements fit, and their norms are at most kCodewordSteps.
float integer_step(const std::vector<float>& rows, const std::vector<float>& mean) {
  constexpr size_t kChains = 8;  // a unit of the stride
  double longest = 0, largest[kChains] = {};
  for (size_t first = 0; first < rows.size(); first += mean.size()) {
    double squares[kChains] = {};
    for (size_t d = 0; d < mean.size(); d += kChains) {
      for (size_t j = 0; j < kChains; ++j) {
        const double c = double{rows[first + d + j]} - double{mean[d + j]};
        squares[j] += c * c;
        largest[j] = std::max(largest[j], std::abs(c));
      }
    }
    longest = std::max(longest, std::accumulate(squares, squares + kChains, 0.0));
  }
  const double element = *std::max_element(largest, largest + kChains);
  const double step = std::max(std::sqrt(longest) / residual::kCodewordSteps, element / 32700);
  return static_cast<float>(std::max(step, 0x1p-80));
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

PackedCodebooks::PackedCodebooks(const float* codebooks, const std::vector<int64_t>& sizes,
                                 int64_t width)
    : isa_(active_isa()),
      width_(width),
      stride_(round_up(width, kStrideUnit)),
      levels_(sizes.size()) {
  for (int64_t size : sizes) size_ += size;
  for (int64_t k = 0; k < size_; ++k) {
    const float* codeword = codebooks + k * width;
    if (!std::all_of(codeword, codeword + width, [](float c) { return std::isfinite(c); })) {
      first_bad_ = k;
      return;
    }
  }
  for (size_t l = 0; l < sizes.size(); ++l) {
    pack(codebooks, sizes[l], levels_[l]);
    codebooks += sizes[l] * width;
  }
}

void PackedCodebooks::pack(const float* codebook, int64_t size, Level& level) const {
  std::unordered_map<std::string_view, int32_t> seen;
  level.slot.resize(size);
  for (int64_t k = 0; k < size; ++k) {
    const char* bytes = reinterpret_cast<const char*>(codebook + k * width_);
    const auto slot = static_cast<int32_t>(level.code.size());
    const auto found = seen.try_emplace({bytes, width_ * sizeof(float)}, slot);
    level.slot[k] = found.first->second;
    if (found.second) level.code.push_back(static_cast<int32_t>(k));
  }
  const auto count = static_cast<int64_t>(level.code.size());
  level.rows.assign(count * stride_, 0);
  level.mean.assign(stride_, 0);
  std::vector<double> mean(width_, 0);
  for (int64_t u = 0; u < count; ++u) {
    const float* codeword = codebook + level.code[u] * width_;
    std::copy_n(codeword, width_, &level.rows[u * stride_]);
    for (int64_t d = 0; d < width_; ++d) mean[d] += codeword[d];
  }
  for (int64_t d = 0; d < width_; ++d) level.mean[d] = static_cast<float>(mean[d] / count);

  const auto [lanes, element, apart] = layout(isa_);
  const bool pairs = element != Element::kFp32;
  const int64_t padded = round_up(count, lanes);
  level.panels.assign(padded * stride_ / (pairs ? 2 : 1), 0);
  // Below every score, and finite when its low bits are replaced.
  level.bias.assign(padded, -3e38f);
  auto* halves = reinterpret_cast<uint16_t*>(level.panels.data());
  if (element == Element::kInt16) level.step = integer_step(level.rows, level.mean);
  const double per_step = 1 / double{level.step};
  // Where the dimensions of a lane are among its halves.
  std::vector<int64_t> places;
  for (int64_t d = 0; pairs && d < width_; ++d) {
    const int64_t pair = d / (2 * apart) * apart + d % apart;
    places.push_back(pair * lanes * 2 + d / apart % 2);
  }
  for (int64_t u = 0; u < count; ++u) {
    const int64_t panel = u / lanes * lanes * stride_, lane = u % lanes;
    double norm = 0, error = 0;
    for (int64_t d = 0; d < width_; ++d) {
      const double exact = double{level.rows[u * stride_ + d]} - double{level.mean[d]};
      const float rounded = static_cast<float>(exact);
      double multiplied = rounded;
      if (pairs) {
        uint16_t half;
        if (element == Element::kBf16) {
          half = to_bf16(rounded);
          multiplied = from_bf16(half);
        } else {
          const auto steps = static_cast<int32_t>(exact * per_step + std::copysign(0.5, exact));
          half = static_cast<uint16_t>(steps);
          multiplied = static_cast<double>(steps) * level.step;
        }
        halves[panel + lane * 2 + places[d]] = half;
      } else {
        level.panels[panel + d * lanes + lane] = rounded;
      }
      norm += exact * exact;
      error += (exact - multiplied) * (exact - multiplied);
    }
    level.bias[u] = static_cast<float>(-norm / 2);
    level.norm = std::max(level.norm, std::sqrt(norm) * 1.000001);
    level.error = std::max(level.error, std::sqrt(error) * 1.000001);
  }
  // bf16 products flush denormal operands.
  level.error += std::sqrt(static_cast<double>(stride_)) * 0x1p-126;
  if (width_ > kMaxScreenWidth) level.norm = std::numeric_limits<double>::infinity();
}

bool PackedCodebooks::matches(const float* codebooks, const std::vector<int64_t>& sizes,
                              int64_t width) const {
  if (first_bad_ >= 0 || isa_ != active_isa() || width != width_ ||
      sizes.size() != levels_.size()) {
    return false;
  }
  for (size_t l = 0; l < sizes.size(); ++l) {
    if (sizes[l] != static_cast<int64_t>(levels_[l].slot.size())) return false;
  }
  for (const Level& level : levels_) {
    for (int32_t slot : level.slot) {
      if (std::memcmp(codebooks, &level.rows[slot * stride_], width * sizeof(float)) != 0) {
        return false;
      }
      codebooks += width;
    }
  }
  return true;
}

size_t PackedCodebooks::bytes() const {
  size_t floats = 0;
  for (const Level& level : levels_) floats += level.rows.size() + level.panels.size();
  return floats * sizeof(float);
}

int64_t residual_quantize(const void* x, RowType type, int64_t rows,
                          const PackedCodebooks& codebooks, int32_t* codes, float* norms,
                          float* residual, int64_t* usage, int threads) {
  if (rows == 0) return -1;
  std::vector<residual::Level> levels;
  const int64_t lanes = layout(codebooks.isa_).lanes;
  std::vector<int64_t> offsets;
  int64_t offset = 0, largest = 0;
  for (const PackedCodebooks::Level& level : codebooks.levels_) {
    offsets.push_back(offset);
    offset += static_cast<int64_t>(level.slot.size());
    largest = std::max<int64_t>(largest, level.panels.size() * sizeof(float));
    const auto count = static_cast<int64_t>(level.code.size());
    int32_t tag_mask = 0;
    while (tag_mask < (count - 1) / lanes) tag_mask = 2 * tag_mask + 1;
    levels.push_back({count, level.rows.data(), level.code.data(), level.mean.data(),
                      level.panels.data(), level.bias.data(), tag_mask, level.step, level.norm,
                      level.error});
  }
  const int64_t stride = codebooks.stride_;
  const residual::Problem problem{x,
                                  static_cast<int>(type),
                                  codebooks.width_,
                                  stride,
                                  levels.data(),
                                  static_cast<int64_t>(levels.size()),
                                  codes,
                                  norms,
                                  residual};
  // Panels that stay in the second-level cache need no more rows to share them.
  const int64_t most = largest <= residual::kPanelBytes ? 1 : kBlockRows / kRowUnit;
  const int64_t units = std::clamp<int64_t>(kBlockFloats / (stride * kRowUnit), 1, most);
  const int64_t fair = round_up((rows + threads - 1) / threads, kRowUnit);
  const int64_t block = std::min(units * kRowUnit, fair);
  const int64_t blocks = (rows + block - 1) / block;
  const auto quantize_block = kernel(codebooks.isa_);
  const int workers = static_cast<int>(std::min<int64_t>(blocks, threads));
  std::atomic<int64_t> next{0};
  std::vector<int64_t> first_bad(workers, -1);
  std::vector<std::vector<int64_t>> counts(workers);
  parallel(workers, [&](int worker) {
    // Residual, operand, two scores a lane, its Row and three words for each row.
    constexpr int64_t kRowFloats = sizeof(residual::Row) / sizeof(float) + 3;
    const auto workspace = aligned<float>(block * (2 * stride + 2 * kMaxLanes + kRowFloats));
    if (usage) counts[worker].assign(codebooks.size_, 0);
    // Blocks are taken in order, so the first bad row is in one already taken.
    int64_t begin = next.fetch_add(block);
    while (begin < rows && first_bad[worker] < 0) {
      const int64_t after = next.fetch_add(block);
      const int64_t count = std::min(block, rows - begin);
      first_bad[worker] = quantize_block(problem, begin, count, after, workspace.get());
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
