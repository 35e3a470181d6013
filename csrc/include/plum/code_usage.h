// How often each code of each level occurs.
#pragma once

#include <cstdint>

namespace plum {

constexpr int kMaxLevels = 64;

namespace cpu {

// Adds to usage[offset_l + codes[n * levels + l]] for every n and l, where offset_l is the sum of
// the sizes before level l. A code outside [0, sizes[l]) is counted nowhere.
// Returns the lowest position n * levels + l of such a code, or -1.
//   codes  [rows, levels] int32 or int64, contiguous
//   usage  [sum of sizes] int64, fewer than 2^31
template <typename Code>
int64_t code_usage(const Code* codes, int64_t rows, int64_t levels, const int64_t* sizes,
                   int64_t* usage, int threads);

}  // namespace cpu

namespace cuda {

// As above, with device pointers; counts[sum of sizes] gets the number of codes out of range.
// Does not synchronize. Throws std::runtime_error when the launch fails.
template <typename Code>
void code_usage(const Code* codes, int64_t rows, int64_t levels, const int64_t* sizes,
                int64_t* counts, void* stream);

}  // namespace cuda
}  // namespace plum
