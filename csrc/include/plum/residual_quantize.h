// Exact nearest codeword of a row's residual, level by level.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "plum/cpu_features.h"
#include "plum/row_type.h"

namespace plum::cpu {

namespace residual {
enum class Element;
struct Level;
}  // namespace residual

// L codebooks of finite fp32 codewords, copied into the layout of the instruction set that is
// active when they are packed. Calls, also of several threads, may share one.
class PackedCodebooks {
 public:
  // codebooks [sum of sizes, width], contiguous, level by level.
  PackedCodebooks(const float* codebooks, const std::vector<int64_t>& sizes, int64_t width);

  // True if packing these codebooks now would give the same object.
  bool matches(const float* codebooks, const std::vector<int64_t>& sizes, int64_t width) const;

  // The first codeword that is not finite, counted over all levels, or -1. Such codebooks cannot
  // be searched.
  int64_t first_bad() const { return first_bad_; }
  // The number of codewords, over all levels.
  int64_t size() const { return size_; }
  int64_t width() const { return width_; }
  int64_t levels() const { return static_cast<int64_t>(levels_.size()); }
  size_t bytes() const;

 private:
  friend int64_t residual_quantize(const void*, RowType, int64_t, const PackedCodebooks&, int32_t*,
                                   float*, float*, int64_t*, int);

  // Equal codewords would all tie in the screen, so only the first of them is kept.
  struct Level {
    std::vector<int32_t> slot;  // [size] where the codeword is in rows
    std::vector<int32_t> code;  // [distinct] the lowest code of a row
    std::vector<float> rows;    // [distinct, stride]
    std::vector<float> mean;    // [stride], subtracted before the screen: smaller norms, less error
  };

  // What a screen multiplies and adds: residual::Level says what is what.
  struct Screen {
    std::vector<float> panels, bias, steps, norms, errors;
    std::vector<int32_t> start;
    int32_t tag_mask = 0;
    float step = 1;
    double norm = 0, error = 0;
  };

  struct Screens {
    residual::Element element;
    std::vector<Screen> levels;
  };

  // Finer screens, made when the first ones leave too many codewords to compare.
  struct Fallback {
    std::atomic<bool> wanted{false};
    std::once_flag once;
    Screens screens;
  };

  void gather(const float* codebook, int64_t size, Level& level) const;
  Screen screen(const Level& level, residual::Element element) const;
  Screens screens(residual::Element element) const;
  // The first ones, until others are wanted.
  const Screens& active_screens() const;
  void want_fallback() const;
  // What a kernel reads.
  std::vector<residual::Level> kernel_levels(const Screens& screens) const;

  Isa isa_;
  int64_t width_, stride_, lanes_;
  int64_t size_ = 0;
  int64_t first_bad_ = -1;
  std::vector<Level> levels_;
  Screens screens_;
  std::unique_ptr<Fallback> fallback_ = std::make_unique<Fallback>();
};

// For every row r = x[n] and level l: codes[n, l] = argmin_k |r - codebook_l[k]|^2, ties to the
// lowest k, compared as fp64 sums of squared differences in the order of the dimensions; then
// r -= codebook_l[codes[n, l]] in fp32 and norms[n, l] = |r|^2. The result does not depend on the
// instruction set or the number of threads, but for the last bits of norms.
// Returns the lowest row that holds a value, or whose residual takes a value, that is not finite;
// then the outputs are undefined and usage is as it was. Returns -1 if there is none.
//   x         [rows, width], contiguous
//   codes     [rows, levels]
//   norms     [rows, levels]
//   residual  [rows, width] after the last level, or null
//   usage     [sum of sizes], to which the counts of the codes are added, or null
int64_t residual_quantize(const void* x, RowType type, int64_t rows,
                          const PackedCodebooks& codebooks, int32_t* codes, float* norms,
                          float* residual, int64_t* usage, int threads);

}  // namespace plum::cpu

namespace plum::cuda {

// The widest rows that the search on a GPU takes.
constexpr int64_t kMaxSearchWidth = 384;

// Bytes of device memory that a search needs beside its arguments.
int64_t residual_quantize_workspace(int64_t width, const int64_t* sizes, int64_t levels);

// As on the CPU, with device pointers, and the codebooks packed in every call; rows may be none.
// Does not synchronize. Throws std::runtime_error when a launch fails.
//   workspace  residual_quantize_workspace bytes, aligned to 256
//   first_bad  [2] large numbers, lowered to the first codeword that is not finite, counted over
//              all levels, and to the lowest row as on the CPU
void residual_quantize(const void* x, cpu::RowType type, int64_t rows, int64_t width,
                       const float* codebooks, const int64_t* sizes, int64_t levels,
                       void* workspace, int32_t* codes, float* norms, float* residual,
                       int64_t* first_bad, void* stream);

// The same for Hopper GPUs (compute capability 9.0) alone, by products of warpgroups; it takes 227
// KiB of shared memory a block. Slower than the other for rows of up to 128 dimensions.
int64_t residual_quantize_wgmma_workspace(int64_t width, const int64_t* sizes, int64_t levels);
void residual_quantize_wgmma(const void* x, cpu::RowType type, int64_t rows, int64_t width,
                             const float* codebooks, const int64_t* sizes, int64_t levels,
                             void* workspace, int32_t* codes, float* norms, float* residual,
                             int64_t* first_bad, void* stream);

}  // namespace plum::cuda
