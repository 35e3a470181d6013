// The CUDA search, run on the CPU, gives the codes of a naive search; with PLUM_WGMMA that for
// Hopper GPUs.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#define PLUM_CUDA_ON_CPU
#ifdef PLUM_WGMMA
#include "../../csrc/cuda/residual_quantize_wgmma.cu"
#else
#include "../../csrc/cuda/residual_quantize.cu"
#endif
#include "check.h"
#include "naive_search.h"

namespace {

#ifdef PLUM_WGMMA
constexpr auto kSearch = plum::cuda::residual_quantize_wgmma;
constexpr auto kWorkspace = plum::cuda::residual_quantize_wgmma_workspace;
// Its blocks have one size, which takes long here.
constexpr bool kOneSize = true;
#else
constexpr auto kSearch = plum::cuda::residual_quantize;
constexpr auto kWorkspace = plum::cuda::residual_quantize_workspace;
constexpr bool kOneSize = false;
#endif

using plum::cpu::RowType;
using Values = std::vector<float>;

struct Case {
  int64_t width;
  Values x;
  std::vector<Values> books;
};

std::mt19937_64 generator(1);

Values normal(int64_t count, float scale = 1) {
  std::normal_distribution<float> distribution;
  Values values(count);
  for (float& value : values) value = scale * distribution(generator);
  return values;
}

int64_t below(int64_t bound) { return static_cast<int64_t>(generator() % bound); }

// The vectors [count, width] moved by one of [width].
Values around(const Values& center, Values values) {
  for (size_t i = 0; i < values.size(); ++i) values[i] += center[i % center.size()];
  return values;
}

struct Answer {
  std::vector<int32_t> codes;
  Values norms, residual;
  int64_t bad_codeword = -1, bad_row = -1;
};

Answer on_gpu(const void* x, RowType type, int64_t rows, int64_t width, const Values& books,
              const std::vector<int64_t>& sizes, bool with_residual) {
  const auto levels = static_cast<int64_t>(sizes.size());
  Answer answer{std::vector<int32_t>(rows * levels, -7), Values(rows * levels, -7),
                Values(with_residual ? rows * width : 0, -7)};
  const auto bytes = static_cast<size_t>(kWorkspace(width, sizes.data(), levels));
  CHECK(bytes % 256 == 0);
  const std::unique_ptr<void, decltype(&std::free)> workspace(std::aligned_alloc(256, bytes),
                                                              &std::free);
  std::memset(workspace.get(), 0xff, bytes);
  const int64_t none = int64_t{1} << 62;
  int64_t first_bad[2] = {none, none};
  kSearch(x, type, rows, width, books.data(), sizes.data(), levels, workspace.get(),
          answer.codes.data(), answer.norms.data(),
          with_residual ? answer.residual.data() : nullptr, first_bad, nullptr);
  if (first_bad[0] < none) answer.bad_codeword = first_bad[0];
  if (first_bad[1] < none) answer.bad_row = first_bad[1];
  return answer;
}

// Shared memory of small blocks, which are quick here, and of the largest.
constexpr int kLargestBlocks = 227 << 10;
int small_blocks(int64_t width) {
  return kOneSize ? kLargestBlocks : (width <= 128 ? 44 : 99) << 10;
}

void compare(const Case& c, RowType type = RowType::kFloat32, const void* x = nullptr,
             bool with_residual = true, int shared_bytes = 0) {
  cuda_on_cpu_shared_bytes = shared_bytes ? shared_bytes : small_blocks(c.width);
  Values books;
  std::vector<int64_t> sizes;
  for (const Values& book : c.books) {
    books.insert(books.end(), book.begin(), book.end());
    sizes.push_back(static_cast<int64_t>(book.size()) / c.width);
  }
  const auto rows = static_cast<int64_t>(c.x.size()) / c.width;
  const Answer got = on_gpu(x ? x : c.x.data(), type, rows, c.width, books, sizes, with_residual);
  const auto bad =
      std::find_if(books.begin(), books.end(), [](float v) { return !std::isfinite(v); });
  CHECK(got.bad_codeword == (bad == books.end() ? -1 : (bad - books.begin()) / c.width));
  if (bad != books.end()) return;
  const NaiveSearch expected = naive_search(c.x, c.width, books, sizes);
  CHECK(got.bad_row == expected.first_bad);
  if (expected.first_bad >= 0) return;
  CHECK(got.codes == expected.codes);
  if (with_residual) CHECK(got.residual == expected.residual);
  check_norms(got.norms, expected.norms, c.width);
}

void compare_near_ties() {
  for (float gap : {1e-3f, 1e-5f, 1e-7f}) {
    const Values center = normal(24);
    const Values book = around(center, normal(200 * 24, gap));
    compare({24, around(center, normal(30 * 24)), {book, book}});
  }
}

void compare_equal_codewords() {
  const Values few = normal(3 * 7);
  Values book;
  for (int i = 0; i < 150; ++i) {
    book.insert(book.end(), few.begin() + i % 3 * 7, few.begin() + i % 3 * 7 + 7);
  }
  compare({7, normal(20 * 7), {book, book}});
  compare({5, normal(20 * 5), {Values(300 * 5), Values(3 * 5)}});
  compare({3, Values(4 * 3), {{-0.f, 0, 0, 0, 0, 0}}});
  // Beside others, and farther apart than a step of the look back.
  Values wide = normal(70 * 384);
  std::copy_n(wide.begin(), 384, wide.end() - 384);
  std::copy_n(wide.begin() + 384, 384, wide.begin() + 33 * 384);
  compare({384, {wide.begin(), wide.begin() + 40 * 384}, {wide}});
}

// Codewords at one distance of the rows, but for the rounding of the sum.
void compare_permuted() {
  Values step = normal(40), book;
  for (int i = 0; i < 90; ++i) {
    std::shuffle(step.begin(), step.end(), generator);
    book.insert(book.end(), step.begin(), step.end());
  }
  Values reversed;
  for (int i = 89; i >= 0; --i) {
    reversed.insert(reversed.end(), book.begin() + i * 40, book.begin() + i * 40 + 40);
  }
  compare({40, Values(5 * 40), {book, reversed}});
}

// Codewords that come in pairs at the same distance of every row.
void compare_mirrored() {
  Values book = normal(60 * 9), rows = normal(50 * 9);
  for (size_t i = 0; i < book.size(); i += 9) book[i] = 1;
  Values mirror = book;
  for (size_t i = 0; i < mirror.size(); i += 9) mirror[i] = -1;
  for (size_t i = 0; i < rows.size(); i += 9) rows[i] = 0;
  book.insert(book.end(), mirror.begin(), mirror.end());
  compare({9, rows, {book, mirror}});
}

void compare_scales() {
  for (float scale : {1e30f, 1e18f, 1e-22f, 1e-40f}) {
    compare({6, normal(9 * 6, scale), {normal(70 * 6, scale), normal(9 * 6)}});
  }
  compare({33,
           around(Values(33, 1000), normal(60 * 33)),
           {around(Values(33, 1000), normal(130 * 33)), normal(9 * 33)}});
  Values mixed = normal(99 * 20);
  for (size_t i = 0; i < mixed.size(); ++i) {
    mixed[i] *= static_cast<float>(std::pow(10, static_cast<double>(i / 20) / 11 - 6));
  }
  compare({20, normal(40 * 20), {mixed, mixed, mixed}});
  // Rows so long beside their codewords that fp16 holds them no more, and some that it just holds.
  for (float length : {500.f, 2000.f, 1e20f}) {
    compare({40, normal(35 * 40, length), {normal(70 * 40), normal(5 * 40)}});
  }
}

// Two nearest codewords, in the first and the last of 2,050 tiles of 16: the low bits of a score
// hold the place, which moves it by more than rounding does here.
void compare_many_tiles() {
  Values half;
  for (int i = 0; i < 16 * 1025; ++i) {
    half.push_back(static_cast<float>(128 + below(127)));
    half.push_back(static_cast<float>(1 + below(255)));
  }
  half[10] = 255, half[11] = 128, half[18] = -255, half[19] = 128;
  Values book = half;
  for (int i = 16 * 1025 - 1; i >= 0; --i) {
    book.push_back(-half[2 * i]);
    book.push_back(-half[2 * i + 1]);
  }
  compare({2, {0x1p20f, 0}, {book}});
}

void compare_shapes() {
  for (int64_t width : {1, 3, 31, 32, 33, 64, 100, 128, 200, 256, 383, 384}) {
    // One kernel is for all up to 256.
    if (kOneSize && width > 1 && width < 200) continue;
    compare({width, normal(width), {normal(width)}});
    compare({width, normal(131 * width), {normal(9 * width), normal(width), normal(70 * width)}});
  }
  for (int64_t width : {32, 384}) {
    compare({width, normal(200 * width), {normal(40 * width), normal(17 * width)}},
            RowType::kFloat32, nullptr, width == 32, kLargestBlocks);
  }
  // Rows that are not aligned as vectors are.
  Case shifted{32, normal(20 * 32), {normal(50 * 32)}};
  Values moved(1);
  moved.insert(moved.end(), shifted.x.begin(), shifted.x.end());
  compare(shifted, RowType::kFloat32, moved.data() + 1);
  std::vector<Values> books;
  for (int size = 1; size <= 64; ++size) books.push_back(normal((size % 7 + 1) * 10));
  compare({10, normal(40 * 10), books});
  Values book = normal(70 * 12);
  compare({12, book, {book, Values(2 * 12)}});
  compare({5, {}, {normal(5)}});
}

// Rows of 16 bits, as the search of what they stand for.
void compare_half_rows() {
  for (RowType type : {RowType::kBfloat16, RowType::kFloat16}) {
    for (int64_t width : {20, 128}) {
      Case c{width, normal(50 * width), {normal(33 * width)}};
      std::vector<uint16_t> half;
      for (float& value : c.x) {
        const auto bits = same_bits<uint32_t>(value);
        half.push_back(type == RowType::kFloat16 ? __double2half(value).bits
                                                 : static_cast<uint16_t>(bits >> 16));
        value = type == RowType::kFloat16 ? __half2float({half.back()})
                                          : same_bits<float>(bits & 0xffff0000u);
      }
      compare(c, type, half.data());
    }
  }
}

// As in tests/residual_cases.py.
Case draw_case() {
  const int64_t widths[] = {3, 8, 70}, most[] = {3, 12, 140};
  const int64_t width = 1 + below(widths[below(3)]), sizes = most[below(3)];
  const float exponents[] = {-44, -38, -22, -19, -6, 0, 0, 0, 4, 15, 18, 30, 38};
  const double scale = std::pow(10., exponents[below(13)]);
  const double offsets[] = {0, 0, 1, 1000};
  const double offset = offsets[below(4)] * scale;
  const int64_t kind = below(6);
  const Values center = normal(width);
  const auto draw = [&](int64_t count) {
    Values values = normal(count * width);
    for (int64_t i = 0; i < count; ++i) {
      const double gap = std::pow(10., -static_cast<double>(1 + below(8)));
      const double norm = std::pow(10., -6 + static_cast<double>(below(9)));
      const bool zero = below(10) < 7;
      const int64_t twin = below(std::max<int64_t>(1, count / 3));
      for (int64_t dim = 0; dim < width; ++dim) {
        double value = values[i * width + dim];
        if (kind == 1) value = static_cast<double>(below(5) - 2);
        if (kind == 2) value = center[dim] + gap * value;
        if (kind == 3 && i >= count / 3) value = values[twin * width + dim];
        if (kind == 4 && zero) value = 0;
        if (kind == 5) value *= norm;
        values[i * width + dim] = static_cast<float>(value);
      }
    }
    for (float& value : values) value = static_cast<float>(value * scale + offset);
    return values;
  };
  Case c{width, draw(1 + below(9)), {}};
  for (int64_t levels = 1 + below(4); levels; --levels) c.books.push_back(draw(1 + below(sizes)));
  if (below(5) == 0) std::copy_n(c.books[0].end() - width, width, c.x.begin());
  return c;
}

void check_bad_values() {
  const float nan = std::numeric_limits<float>::quiet_NaN(), infinity = HUGE_VALF;
  Case c{5, normal(400 * 5), {normal(7 * 5), normal(4 * 5)}};
  for (float bad : {nan, infinity, -infinity}) {
    Case broken = c;
    broken.x[390 * 5 + 4] = broken.x[257 * 5] = bad;
    compare(broken);
    broken = c;
    broken.books[1][2 * 5 + 3] = bad;
    compare(broken);
  }
  // 3e38 - -3e38 overflows, in an earlier row than the NaN.
  compare({1, {0, 3e38f, nan}, {{-3e38f}}});
  // The rows beside a bad one have their codes.
  Values books = c.books[0];
  books.insert(books.end(), c.books[1].begin(), c.books[1].end());
  const Answer whole = on_gpu(c.x.data(), RowType::kFloat32, 400, 5, books, {7, 4}, true);
  c.x[257 * 5] = nan;
  const Answer part = on_gpu(c.x.data(), RowType::kFloat32, 400, 5, books, {7, 4}, true);
  CHECK(part.bad_row == 257);
  for (int i = 0; i < 800; ++i) CHECK(i / 2 == 257 || part.codes[i] == whole.codes[i]);
}

}  // namespace

int main(int count, char** arguments) {
  compare_near_ties();
  compare_equal_codewords();
  compare_permuted();
  compare_mirrored();
  compare_scales();
  compare_many_tiles();
  compare_shapes();
  compare_half_rows();
  check_bad_values();
  for (int cases = count > 1 ? std::atoi(arguments[1]) : kOneSize ? 5 : 25; cases; --cases)
    compare(draw_case());
  std::puts("ok");
}
