// The body of trie_mask_, compiled once per instruction set inside the namespace PLUM_ISA.
// Includes nothing: an inline library function compiled here could be the copy the linker keeps.

namespace plum::cpu::PLUM_ISA {

// Children at least one column in so many are marked in a table of bytes; fewer are set aside.
constexpr int64_t kSparse = 16;

template <typename Word>
void fill_words(Word* row, int64_t count, Word value) {
  for (int64_t v = 0; v < count; ++v) row[v] = value;
}

// Masks one row: its columns offset + codes[0..count) are left, and the codes rise.
//   kept, legal  scratch of `width` each; `legal` is zero before and after
template <typename Word>
void mask_row(Word* row, int64_t width, int64_t offset, Word fill, const int32_t* codes,
              int64_t count, Word* kept, uint8_t* legal) {
  fill_words(row, offset, fill);
  row += offset;
  width -= offset;
  if (count * kSparse < width) {
    for (int64_t i = 0; i < count; ++i) kept[i] = row[codes[i]];
    fill_words(row, width, fill);
    for (int64_t i = 0; i < count; ++i) row[codes[i]] = kept[i];
    return;
  }
  const int64_t first = codes[0], last = codes[count - 1] + 1;
  fill_words(row, first, fill);
  if (last - first > count) {
    for (int64_t i = 0; i < count; ++i) legal[codes[i]] = 1;
    for (int64_t v = first; v < last; ++v) row[v] = legal[v] ? row[v] : fill;
    fill_words(legal + first, last - first, uint8_t{0});
  }
  fill_words(row + last, width - last, fill);
}

template void mask_row<uint32_t>(uint32_t*, int64_t, int64_t, uint32_t, const int32_t*, int64_t,
                                 uint32_t*, uint8_t*);
template void mask_row<uint16_t>(uint16_t*, int64_t, int64_t, uint16_t, const int32_t*, int64_t,
                                 uint16_t*, uint8_t*);

}  // namespace plum::cpu::PLUM_ISA
