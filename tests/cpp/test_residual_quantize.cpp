#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "naive_search.h"
#include "plum/cpu_features.h"
#include "plum/residual_quantize.h"

namespace {

using plum::cpu::PackedCodebooks;
using plum::cpu::RowType;

struct Case {
  int64_t rows, width;
  std::vector<int64_t> sizes;
  std::vector<float> x, codebooks;
};

enum class Values { kNormal, kGrid, kOffset, kNearTies, kTiny, kHuge };

Case make_case(int64_t rows, int64_t width, const std::vector<int64_t>& sizes, Values values) {
  std::mt19937_64 random(rows * 31 + width);
  std::normal_distribution<float> normal;
  Case c{rows, width, sizes, std::vector<float>(rows * width), {}};
  std::vector<float> center(width);
  for (float& value : center) value = normal(random);
  const auto draw = [&](int64_t i) {
    const float value = normal(random);
    switch (values) {
      case Values::kNormal:
        return value;
      case Values::kGrid:
        return std::round(value);
      case Values::kOffset:
        return 1000 + value;
      case Values::kNearTies:
        return center[i % width] + 1e-7f * value;
      case Values::kTiny:
        return value * 1e-39f;
      case Values::kHuge:
        return value * 1e37f;
    }
    return value;
  };
  for (int64_t i = 0; i < rows * width; ++i) {
    c.x[i] = values == Values::kNearTies ? normal(random) : draw(i);
  }
  for (int64_t size : sizes) {
    const auto begin = static_cast<int64_t>(c.codebooks.size());
    for (int64_t i = 0; i < size * width; ++i) c.codebooks.push_back(draw(i));
    // The last codeword repeats the first.
    for (int64_t d = 0; d < width; ++d) {
      c.codebooks[begin + (size - 1) * width + d] = c.codebooks[begin + d];
    }
  }
  return c;
}

struct Answer {
  std::vector<int32_t> codes;
  std::vector<float> norms, residual;
  std::vector<int64_t> usage;
};

NaiveSearch naive(const Case& c) { return naive_search(c.x, c.width, c.codebooks, c.sizes); }

int64_t run(const Case& c, const void* x, RowType type, int threads, Answer& answer) {
  const PackedCodebooks packed(c.codebooks.data(), c.sizes, c.width);
  CHECK(packed.first_bad() == -1);
  CHECK(packed.matches(c.codebooks.data(), c.sizes, c.width));
  answer.codes.assign(c.rows * c.sizes.size(), -1);
  answer.norms.assign(c.rows * c.sizes.size(), -1);
  answer.residual.assign(c.rows * c.width, -1);
  answer.usage.assign(packed.size(), 7);
  return plum::cpu::residual_quantize(x, type, c.rows, packed, answer.codes.data(),
                                      answer.norms.data(), answer.residual.data(),
                                      answer.usage.data(), threads);
}

void check_equal(const Case& c, const Answer& answer, const NaiveSearch& expected) {
  CHECK(answer.codes == expected.codes);
  CHECK(answer.residual == expected.residual);
  CHECK(answer.usage == expected.usage);
  check_norms(answer.norms, expected.norms, c.width);
}

void compare_with_naive(int64_t rows, int64_t width, const std::vector<int64_t>& sizes,
                        Values values) {
  const Case c = make_case(rows, width, sizes, values);
  const NaiveSearch expected = naive(c);
  for (const std::string& isa : plum::cpu::available_isas()) {
    plum::cpu::set_isa(isa);
    for (int threads : {1, 3}) {
      Answer answer;
      CHECK(run(c, c.x.data(), RowType::kFloat32, threads, answer) == -1);
      check_equal(c, answer, expected);
    }
  }
}

// One codeword a little nearer to 0 than `others`, which cannot be told apart before the last
// comparison: as many as are kept, or more, beside one that was compared before.
void check_crowds(int64_t others) {
  const int64_t width = 256;
  Case c{1, width, {others + 1}, std::vector<float>(width), {}};
  const float rest = std::sqrt((width * (1 - 2e-6f) - 64) / (width - 1));
  std::mt19937_64 random(others);
  for (int64_t k = 0; k <= others; ++k) {
    for (int64_t d = 0; d < width; ++d) {
      const float size = k ? 1 : d ? rest : 8;
      c.codebooks.push_back(random() & 1 ? size : -size);
    }
  }
  const NaiveSearch expected = naive(c);
  CHECK(expected.codes[0] == 0);
  for (const std::string& isa : plum::cpu::available_isas()) {
    plum::cpu::set_isa(isa);
    Answer answer;
    CHECK(run(c, c.x.data(), RowType::kFloat32, 1, answer) == -1);
    check_equal(c, answer, expected);
  }
}

// Every fp16 pattern as a row of width 1, as the CPU's answer to the widened value.
void check_half_rows(RowType type) {
  Case c{1 << 16, 1, {3}, std::vector<float>(1 << 16), {-1, 0.25, 100}};
  std::vector<uint16_t> half(c.rows);
  for (uint32_t bits = 0; bits < 1 << 16; ++bits) {
    const uint32_t magnitude = bits & 0x7fff;
    if (type == RowType::kBfloat16) {
      if (magnitude >= 0x7f80) continue;
      const uint32_t wide = bits << 16;
      std::memcpy(&c.x[bits], &wide, sizeof wide);
    } else {
      if (magnitude >= 0x7c00) continue;
      const uint32_t exponent = magnitude >> 10, fraction = magnitude & 0x3ff;
      const float value = exponent ? std::ldexp(1024.0f + fraction, int(exponent) - 25)
                                   : std::ldexp(float(fraction), -24);
      c.x[bits] = bits & 0x8000 ? -value : value;
    }
    half[bits] = static_cast<uint16_t>(bits);
  }
  const NaiveSearch expected = naive(c);
  for (const std::string& isa : plum::cpu::available_isas()) {
    plum::cpu::set_isa(isa);
    Answer answer;
    CHECK(run(c, half.data(), type, 1, answer) == -1);
    CHECK(answer.codes == expected.codes);
    CHECK(answer.residual == expected.residual);
  }
}

void check_bad_values() {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const std::string& isa : plum::cpu::available_isas()) {
    plum::cpu::set_isa(isa);
    Answer answer;
    Case c = make_case(1000, 5, {7, 4}, Values::kNormal);
    c.x[431 * 5 + 4] = nan;
    c.x[900 * 5] = std::numeric_limits<float>::infinity();
    CHECK(run(c, c.x.data(), RowType::kFloat32, 2, answer) == 431);
    CHECK(answer.usage == std::vector<int64_t>(11, 7));
    // 3e38 - -3e38 overflows, in an earlier row than the NaN.
    c = Case{3, 1, {1}, {0, 3e38f, nan}, {-3e38f}};
    CHECK(run(c, c.x.data(), RowType::kFloat32, 1, answer) == 1);
    c.codebooks = {1, 2, nan, 4};
    CHECK(PackedCodebooks(c.codebooks.data(), {1, 3}, 1).first_bad() == 2);
    c.codebooks[2] = 3;
    const PackedCodebooks packed(c.codebooks.data(), {1, 3}, 1);
    CHECK(!packed.matches(c.codebooks.data(), {3, 1}, 1));
    c.codebooks[3] = 5;
    CHECK(!packed.matches(c.codebooks.data(), {1, 3}, 1));
  }
}

}  // namespace

int main() {
  for (Values values : {Values::kNormal, Values::kGrid, Values::kOffset, Values::kNearTies,
                        Values::kTiny, Values::kHuge}) {
    for (int64_t width : {1, 3, 31, 32, 33, 100}) {
      compare_with_naive(65, width, {1, 63, 65}, values);
    }
    compare_with_naive(700, 17, {130, 64, 31}, values);
    // Screened in int8 first, the second also by the fallback.
    compare_with_naive(65, 100, {310, 290}, values);
    compare_with_naive(200, 70, {600}, values);
    compare_with_naive(3, 1100, {40, 5}, values);
  }
  compare_with_naive(40, 2, {5000}, Values::kNormal);
  compare_with_naive(1, 1, std::vector<int64_t>(20, 2), Values::kNormal);
  for (int64_t others : {510, 511, 512, 513, 514, 2000}) check_crowds(others);
  compare_with_naive(0, 4, {2}, Values::kNormal);
  check_half_rows(RowType::kBfloat16);
  check_half_rows(RowType::kFloat16);
  check_bad_values();
  std::puts("test_residual_quantize: ok");
}
