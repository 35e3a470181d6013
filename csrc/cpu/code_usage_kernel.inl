// The body of code_usage, compiled once per instruction set inside the namespace PLUM_ISA.
// Includes nothing: an inline library function compiled here could be the copy the linker keeps.

namespace plum::cpu::PLUM_ISA {

// Codes a block: its slots stay in L1.
constexpr int64_t kBlock = 4096;

// Counts rows [begin, end) into two histograms of `total + 1` slots each; slot `total` takes the
// codes out of range. `offset` and `size` repeat the levels `repeat` times, so that the slot
// computation runs over a contiguous block and vectorizes for any number of levels.
template <typename Code>
int64_t count_rows(const Code* codes, int64_t begin, int64_t end, int64_t levels, int64_t repeat,
                   const uint32_t* offset, const uint32_t* size, uint32_t total,
                   uint32_t* histogram) {
  alignas(64) uint32_t slots[kBlock];
  // Neighbors of equal code go to different histograms: no store waits for the one before.
  uint32_t* even = histogram;
  uint32_t* odd = histogram + total + 1;
  int64_t first_bad = -1;
  for (int64_t row = begin; row < end; row += repeat) {
    const int64_t rows = row + repeat < end ? repeat : end - row;
    const int64_t count = rows * levels;
    const Code* block = codes + row * levels;
    uint32_t bad = 0;
    for (int64_t i = 0; i < count; ++i) {
      const uint64_t code = static_cast<uint64_t>(block[i]);
      const uint32_t outside = code >= size[i];
      bad |= outside;
      slots[i] = outside ? total : offset[i] + static_cast<uint32_t>(code);
    }
    int64_t i = 0;
    for (; i + 1 < count; i += 2) {
      ++even[slots[i]];
      ++odd[slots[i + 1]];
    }
    if (i < count) ++even[slots[i]];
    if (bad && first_bad < 0) {
      for (int64_t j = 0; j < count; ++j) {
        if (slots[j] == total) {
          first_bad = row * levels + j;
          break;
        }
      }
    }
  }
  return first_bad;
}

template int64_t count_rows<int32_t>(const int32_t*, int64_t, int64_t, int64_t, int64_t,
                                     const uint32_t*, const uint32_t*, uint32_t, uint32_t*);
template int64_t count_rows<int64_t>(const int64_t*, int64_t, int64_t, int64_t, int64_t,
                                     const uint32_t*, const uint32_t*, uint32_t, uint32_t*);

}  // namespace plum::cpu::PLUM_ISA
