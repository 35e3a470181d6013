// The CUDA counts of codes, run on the CPU, are those of a naive loop.
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#define PLUM_CUDA_ON_CPU
#include "../../csrc/cuda/code_usage.cu"
#include "check.h"

namespace {

template <typename Code>
void compare_with_naive(int64_t rows, const std::vector<int64_t>& sizes, unsigned bad_in) {
  std::mt19937 random(rows * 31 + sizes.size());
  const auto levels = static_cast<int64_t>(sizes.size());
  int64_t total = 0;
  for (int64_t size : sizes) total += size;
  std::vector<Code> codes(rows * levels);
  std::vector<int64_t> expected(total + 1, 7), counts(total + 1, 7);
  for (int64_t n = 0; n < rows; ++n) {
    int64_t offset = 0;
    for (int64_t l = 0; l < levels; ++l) {
      const bool bad = bad_in > 0 && random() % bad_in == 0;
      const int64_t code = bad ? (random() % 2 ? -1 : sizes[l]) : random() % sizes[l];
      codes[n * levels + l] = static_cast<Code>(code);
      ++expected[bad ? total : offset + code];
      offset += sizes[l];
    }
  }
  plum::cuda::code_usage(codes.data(), rows, levels, sizes.data(), counts.data(), nullptr);
  CHECK(counts == expected);
}

}  // namespace

int main() {
  for (int64_t rows : {0, 1, 85, 8191, 20001}) {
    for (const std::vector<int64_t>& sizes :
         {std::vector<int64_t>{1}, {256, 256, 256}, {5, 1, 13000, 2}}) {
      for (unsigned bad_in : {0u, 50u}) {
        compare_with_naive<int32_t>(rows, sizes, bad_in);
        compare_with_naive<int64_t>(rows, sizes, bad_in);
      }
    }
  }
  std::puts("test_cuda_code_usage: ok");
}
