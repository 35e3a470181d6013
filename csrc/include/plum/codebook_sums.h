// The sum of the residuals on each code of each level.
#pragma once

#include <cstdint>

#include "plum/row_type.h"

namespace plum::cpu {

// For every row r = x[n], in the order of n, and every level l, with code c = codes[n, l]:
// sums[offset_l + c] += r in fp64, then r -= codebooks[offset_l + c] in fp32, where offset_l is the
// sum of the sizes before level l. The sums do not depend on the instruction set or the number of
// threads. Returns the lowest position n * levels + l of a code outside [0, sizes[l]), and then
// leaves `sums` as it was, or -1.
//   x          [rows, width], contiguous
//   codes      [rows, levels] int32 or int64, contiguous
//   codebooks  [sum of sizes, width]
//   sums       [sum of sizes, width], overwritten
template <typename Code>
int64_t codebook_sums(const void* x, RowType type, int64_t rows, int64_t width, const Code* codes,
                      int64_t levels, const int64_t* sizes, const float* codebooks, double* sums,
                      int threads);

}  // namespace plum::cpu
