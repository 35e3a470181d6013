#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "plum/codebook_sums.h"
#include "plum/cpu_features.h"

namespace {

using plum::cpu::RowType;

float widened(uint16_t half, RowType type) {
  if (type == RowType::kBfloat16) {
    const uint32_t bits = uint32_t{half} << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  const int exponent = half >> 10 & 0x1f, fraction = half & 0x3ff;
  const float magnitude = exponent
                              ? std::ldexp(1024.0f + static_cast<float>(fraction), exponent - 25)
                              : std::ldexp(static_cast<float>(fraction), -24);
  return half & 0x8000 ? -magnitude : magnitude;
}

template <typename Code>
void compare_with_naive(int64_t rows, int64_t width, const std::vector<int64_t>& sizes,
                        RowType type) {
  std::mt19937_64 random(rows * 31 + width);
  std::normal_distribution<float> normal;
  const auto levels = static_cast<int64_t>(sizes.size());
  int64_t total = 0;
  for (int64_t size : sizes) total += size;
  std::vector<float> x(rows * width), codebooks(total * width);
  std::vector<uint16_t> half(rows * width);
  for (int64_t i = 0; i < rows * width; ++i) {
    if (type == RowType::kFloat32) {
      x[i] = normal(random);
      continue;
    }
    half[i] = static_cast<uint16_t>(random());
    // All but infinity and NaN; of bf16, what adds up without rounding everything else away.
    if (type == RowType::kFloat16 && (half[i] & 0x7c00) == 0x7c00) half[i] ^= 0x4000;
    if (type == RowType::kBfloat16) half[i] = (half[i] & 0x83ff) | 0x3c00;
    x[i] = widened(half[i], type);
  }
  for (float& c : codebooks) c = normal(random);
  std::vector<Code> codes(rows * levels);
  for (int64_t i = 0; i < rows * levels; ++i) codes[i] = random() % sizes[i % levels];

  std::vector<double> expected(total * width, 0);
  for (int64_t n = 0; n < rows; ++n) {
    for (int64_t d = 0; d < width; ++d) {
      float r = x[n * width + d];
      int64_t offset = 0;
      for (int64_t l = 0; l < levels; ++l) {
        const int64_t at = (offset + codes[n * levels + l]) * width + d;
        expected[at] += r;
        r -= codebooks[at];
        offset += sizes[l];
      }
    }
  }
  const void* pointer =
      type == RowType::kFloat32 ? static_cast<const void*>(x.data()) : half.data();
  for (const std::string& isa : plum::cpu::available_isas()) {
    plum::cpu::set_isa(isa);
    for (int threads : {1, 2, 5}) {
      const auto run = [&](std::vector<double>& sums) {
        return plum::cpu::codebook_sums(pointer, type, rows, width, codes.data(), levels,
                                        sizes.data(), codebooks.data(), sums.data(), threads);
      };
      std::vector<double> sums(total * width, -1);
      CHECK(run(sums) == -1);
      CHECK(sums == expected);
      if (rows == 0) continue;
      for (const Code bad : {static_cast<Code>(-1), static_cast<Code>(sizes.back())}) {
        const int64_t first = rows / 2 * levels + levels - 1, last = rows * levels - 1;
        const Code before = codes[first], before_last = codes[last];
        codes[first] = codes[last] = bad;
        CHECK(run(sums) == first);
        CHECK(sums == expected);
        codes[last] = before_last;
        codes[first] = before;
      }
    }
  }
}

}  // namespace

int main() {
  for (RowType type : {RowType::kFloat32, RowType::kBfloat16, RowType::kFloat16}) {
    for (int64_t width : {1, 31, 32, 33, 64, 100, 384}) {
      compare_with_naive<int32_t>(300, width, {9, 1, 40}, type);
    }
    compare_with_naive<int64_t>(5000, 130, {64, 64, 64}, type);
  }
  // More sums than the second-level cache holds at 64 columns.
  compare_with_naive<int32_t>(2000, 128, {2048, 300}, RowType::kFloat32);
  compare_with_naive<int32_t>(700, 3, std::vector<int64_t>(16, 5), RowType::kFloat32);
  compare_with_naive<int64_t>(0, 5, {3, 2}, RowType::kFloat32);
  std::puts("test_codebook_sums: ok");
}
