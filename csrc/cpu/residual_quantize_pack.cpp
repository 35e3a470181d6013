#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <string_view>
#include <unordered_map>

#include "aligned.h"
#include "plum/residual_quantize.h"
#include "residual_quantize_types.h"

namespace plum::cpu {
namespace {

using residual::Element;

// Beyond this width the error bound of the screen does not hold, so it is not trusted.
constexpr int64_t kMaxScreenWidth = 1 << 21;
// Beyond this width a sum of int8 products may leave int32.
constexpr int64_t kMaxInt8Width = 1 << 16;

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

// Centers codeword u: values [stride].
void center(const std::vector<float>& rows, const std::vector<float>& mean, int64_t u,
            std::vector<double>& values) {
  const float* row = &rows[u * values.size()];
  for (size_t d = 0; d < values.size(); ++d) values[d] = double{row[d]} - double{mean[d]};
}

struct Size {
  double square, largest;
};

// The sum of squares and the largest absolute value, in chains that run at once.
Size size_of(const std::vector<double>& values) {
  constexpr size_t kChains = 8;  // a part of a stride
  double squares[kChains] = {}, largest[kChains] = {};
  for (size_t d = 0; d < values.size(); d += kChains) {
    for (size_t j = 0; j < kChains; ++j) {
      squares[j] += values[d + j] * values[d + j];
      largest[j] = std::max(largest[j], std::abs(values[d + j]));
    }
  }
  return {std::accumulate(squares, squares + kChains, 0.0),
          *std::max_element(largest, largest + kChains)};
}

// The step of int16 codewords: their elements fit, and their norms are at most kCodewordSteps.
double integer_step(const std::vector<float>& rows, const std::vector<float>& mean) {
  Size most{0, 0};
  std::vector<double> values(mean.size());
  for (size_t u = 0; u < rows.size() / mean.size(); ++u) {
    center(rows, mean, u, values);
    const Size size = size_of(values);
    most = {std::max(most.square, size.square), std::max(most.largest, size.largest)};
  }
  return std::max(std::sqrt(most.square) / residual::kCodewordSteps, most.largest / 32700);
}

// Turns values into what is left of them by rounding to what the screen multiplies; `bits` holds
// that, as a number of steps where those are integers.
void round_values(Element element, float step, std::vector<double>& values,
                  std::vector<uint32_t>& bits) {
  const double per_step = 1 / double{step};
  for (size_t d = 0; d < values.size(); ++d) {
    if (element == Element::kFp32) {
      const auto rounded = static_cast<float>(values[d]);
      std::memcpy(&bits[d], &rounded, sizeof rounded);
      values[d] -= rounded;
    } else if (element == Element::kBf16) {
      bits[d] = to_bf16(static_cast<float>(values[d]));
      values[d] -= from_bf16(static_cast<uint16_t>(bits[d]));
    } else {
      const double half = std::copysign(0.5, values[d]);
      const auto steps = static_cast<int32_t>(values[d] * per_step + half);
      bits[d] = static_cast<uint32_t>(steps);
      values[d] -= steps * double{step};
    }
  }
}

// Where an int8 screen saves more than its bounds and what they leave to compare take, as measured
// on an Intel CPU without bf16 and an AMD CPU with it.
bool coarse_pays(Isa isa, int64_t lanes_a_level, int64_t width) {
  if (isa != Isa::kAvx512Vnni && isa != Isa::kAvx512Bf16) return false;
  const int64_t least = 64 * (width + (isa == Isa::kAvx512Bf16 ? 64 : 192));
  return lanes_a_level * (width - 32) >= least && width <= kMaxInt8Width;
}

// What the screen of an instruction set multiplies where int8 does not pay.
Element fine_element(Isa isa) {
  switch (isa) {
    case Isa::kAmxBf16:
    case Isa::kAvx512Bf16:
      return Element::kBf16;
    case Isa::kAvx512Vnni:
    case Isa::kAvx2:
      return Element::kInt16;
    default:
      return Element::kFp32;
  }
}

// How many dimensions share 4 bytes.
int64_t dimensions_of(Element element) {
  return element == Element::kInt8 ? 4 : element == Element::kFp32 ? 1 : 2;
}

// Where dimensions are among the numbers of a panel, before those of other lanes are put between.
std::vector<int64_t> places(Isa isa, Element element, int64_t width, int64_t lanes) {
  std::vector<int64_t> found;
  const int64_t each = dimensions_of(element);
  // Pairs are of the same position in two vectors.
  const int64_t apart = isa == Isa::kAvx2 ? 8 : 16;
  for (int64_t d = 0; d < width; ++d) {
    const int64_t at = each == 2 ? d / (2 * apart) * apart + d % apart : d / each;
    found.push_back(at * lanes * each + (each == 2 ? d / apart % 2 : d % each));
  }
  return found;
}

}  // namespace

PackedCodebooks::PackedCodebooks(const float* codebooks, const std::vector<int64_t>& sizes,
                                 int64_t width)
    : isa_(active_isa()),
      width_(width),
      stride_(round_up(width, residual::kStrideUnit)),
      lanes_(isa_ == Isa::kAmxBf16 ? 32 : residual::kMaxLanes),
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
    gather(codebooks, sizes[l], levels_[l]);
    codebooks += sizes[l] * width;
  }
  int64_t lanes = 0;
  for (const Level& level : levels_) {
    lanes += round_up(static_cast<int64_t>(level.code.size()), lanes_);
  }
  const bool coarse = coarse_pays(isa_, lanes / static_cast<int64_t>(sizes.size()), width);
  screens_ = screens(coarse ? Element::kInt8 : fine_element(isa_));
}

void PackedCodebooks::gather(const float* codebook, int64_t size, Level& level) const {
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
}

PackedCodebooks::Screens PackedCodebooks::screens(Element element) const {
  Screens screens{element, {}};
  for (const Level& level : levels_) screens.levels.push_back(screen(level, element));
  return screens;
}

PackedCodebooks::Screen PackedCodebooks::screen(const Level& level, Element element) const {
  Screen screen;
  const auto count = static_cast<int64_t>(level.code.size());
  const int64_t padded = round_up(count, lanes_), each = dimensions_of(element);
  while (screen.tag_mask < (count - 1) / lanes_) screen.tag_mask = 2 * screen.tag_mask + 1;
  screen.panels.assign(padded * stride_ / each, 0);
  screen.bias.assign(padded, residual::kNone);
  auto* words = reinterpret_cast<uint32_t*>(screen.panels.data());
  auto* halves = reinterpret_cast<uint16_t*>(screen.panels.data());
  auto* bytes = reinterpret_cast<uint8_t*>(screen.panels.data());
  constexpr double kLeastStep = 0x1p-80;
  if (element == Element::kInt16) {
    screen.step = static_cast<float>(std::max(integer_step(level.rows, level.mean), kLeastStep));
  }
  if (element == Element::kInt8) {
    screen.start.assign(padded, 0);
    screen.steps.assign(padded, 0);
    screen.norms.assign(padded, 0);
    screen.errors.assign(padded, 0);
  }
  const std::vector<int64_t> place = places(isa_, element, width_, lanes_);
  std::vector<double> values(stride_);
  std::vector<uint32_t> bits(stride_);
  for (int64_t u = 0; u < count; ++u) {
    center(level.rows, level.mean, u, values);
    const Size size = size_of(values);
    float step = screen.step;
    if (element == Element::kInt8) {
      step = screen.steps[u] = static_cast<float>(std::max(size.largest / 127, kLeastStep));
    }
    round_values(element, step, values, bits);
    const int64_t panel = u / lanes_ * lanes_ * stride_ + u % lanes_ * each;
    for (int64_t d = 0; d < width_; ++d) {
      const int64_t at = panel + place[d];
      if (each == 1) words[at] = bits[d];
      if (each == 2) halves[at] = static_cast<uint16_t>(bits[d]);
      if (each == 4) bytes[at] = static_cast<uint8_t>(bits[d]);
    }
    screen.bias[u] = static_cast<float>(-size.square / 2);
    const double norm = std::sqrt(size.square) * 1.000001;
    const double error = std::sqrt(size_of(values).square) * 1.000001;
    if (element == Element::kInt8) {
      const uint32_t sum = std::accumulate(bits.begin(), bits.end(), uint32_t{0});
      screen.start[u] = -residual::kByteOffset * static_cast<int32_t>(sum);
      screen.norms[u] = static_cast<float>((norm + error) * 1.000001);
      screen.errors[u] = static_cast<float>(error * 1.000001);
    }
    screen.norm = std::max(screen.norm, norm);
    screen.error = std::max(screen.error, error);
  }
  // bf16 products flush denormal operands.
  screen.error += std::sqrt(static_cast<double>(stride_)) * 0x1p-126;
  if (width_ > kMaxScreenWidth) screen.norm = std::numeric_limits<double>::infinity();
  return screen;
}

const PackedCodebooks::Screens& PackedCodebooks::active_screens() const {
  if (!fallback_->wanted.load(std::memory_order_relaxed)) return screens_;
  std::call_once(fallback_->once, [this] { fallback_->screens = screens(fine_element(isa_)); });
  return fallback_->screens;
}

void PackedCodebooks::want_fallback() const {
  fallback_->wanted.store(true, std::memory_order_relaxed);
}

std::vector<residual::Level> PackedCodebooks::kernel_levels(const Screens& screens) const {
  std::vector<residual::Level> found;
  for (size_t l = 0; l < levels_.size(); ++l) {
    const Level& level = levels_[l];
    const Screen& screen = screens.levels[l];
    found.push_back({static_cast<int64_t>(level.code.size()), level.rows.data(), level.code.data(),
                     level.mean.data(), screen.panels.data(), screen.bias.data(),
                     screen.start.data(), screen.steps.data(), screen.norms.data(),
                     screen.errors.data(), screen.tag_mask, screen.step, screen.norm,
                     screen.error});
  }
  return found;
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
  for (const Level& level : levels_) floats += level.rows.size();
  for (const Screen& screen : screens_.levels) floats += screen.panels.size();
  return floats * sizeof(float);
}

}  // namespace plum::cpu
