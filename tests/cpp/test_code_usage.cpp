#include <algorithm>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "plum/code_usage.h"
#include "plum/cpu_features.h"

namespace {

template <typename Code>
void compare_with_naive(int64_t rows, const std::vector<int64_t>& sizes, double bad_share,
                        int threads) {
  std::mt19937_64 random(rows * 31 + sizes.size());
  const auto levels = static_cast<int64_t>(sizes.size());
  int64_t total = 0;
  for (int64_t size : sizes) total += size;
  std::vector<Code> codes(rows * levels);
  std::vector<int64_t> expected(total, 7), usage(total, 7);
  int64_t expected_bad = -1;
  for (int64_t n = 0; n < rows; ++n) {
    int64_t offset = 0;
    for (int64_t l = 0; l < levels; ++l) {
      const bool bad = std::uniform_real_distribution<>()(random) < bad_share;
      const int64_t code =
          bad ? (random() % 2 ? -1 : sizes[l]) : static_cast<int64_t>(random() % sizes[l]);
      codes[n * levels + l] = static_cast<Code>(code);
      if (!bad) ++expected[offset + code];
      if (bad && expected_bad < 0) expected_bad = n * levels + l;
      offset += sizes[l];
    }
  }
  const int64_t bad =
      plum::cpu::code_usage(codes.data(), rows, levels, sizes.data(), usage.data(), threads);
  CHECK(bad == expected_bad);
  CHECK(usage == expected);
}

}  // namespace

int main() {
  for (const std::string& isa : plum::cpu::available_isas()) {
    plum::cpu::set_isa(isa);
    CHECK(plum::cpu::active_isa_name() == isa);
    for (int threads : {1, 3}) {
      for (int64_t rows : {0, 1, 2, 63, 1365, 1366, 100003}) {
        for (const std::vector<int64_t>& sizes :
             {std::vector<int64_t>{1}, {256, 256, 256}, {2048, 1024, 512}, {5, 1, 70000, 2, 3}}) {
          for (double bad_share : {0.0, 0.001}) {
            compare_with_naive<int32_t>(rows, sizes, bad_share, threads);
            compare_with_naive<int64_t>(rows, sizes, bad_share, threads);
          }
        }
      }
    }
  }
  bool thrown = false;
  try {
    plum::cpu::set_isa("mmx");
  } catch (const std::invalid_argument&) {
    thrown = true;
  }
  CHECK(thrown);
  std::puts("test_code_usage: ok");
}
