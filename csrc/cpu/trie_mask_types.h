// What trie_mask.cpp and the kernel variants exchange.
#pragma once

#include <cstdint>

namespace plum::cpu {

// The vector parts for one instruction set; trie_mask_kernel.inl says what each does.
template <typename Word>
struct Masker {
  void (*by_bits)(const Word* row, int64_t size, const uint64_t* bits, Word fill, Word* out);
  void (*fill)(Word* row, int64_t count, Word value);
};

}  // namespace plum::cpu
