// The body of trie_mask_, compiled once per instruction set inside the namespace PLUM_ISA.
// Includes no library: an inline function compiled here could be the copy the linker keeps.

namespace plum::cpu::PLUM_ISA {

template <typename Word>
void fill_words(Word* row, int64_t count, Word value) {
  for (int64_t v = 0; v < count; ++v) row[v] = value;
}

// Copies eight words, `fill` where the bit is 0.
inline void copy_eight(const uint32_t* row, uint32_t bits, uint32_t fill, uint32_t* out) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                      _mm256_mask_loadu_epi32(_mm256_set1_epi32(static_cast<int>(fill)),
                                              static_cast<__mmask8>(bits), row));
#elif defined(__AVX2__)
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set =
      _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane), lane);
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                      _mm256_blendv_epi8(_mm256_set1_epi32(static_cast<int>(fill)), words, set));
#else
  for (int i = 0; i < 8; ++i) out[i] = bits >> i & 1 ? row[i] : fill;
#endif
}

inline void copy_eight(const uint16_t* row, uint32_t bits, uint16_t fill, uint16_t* out) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                   _mm_mask_loadu_epi16(_mm_set1_epi16(static_cast<short>(fill)),
                                        static_cast<__mmask8>(bits), row));
#elif defined(__AVX2__)
  const __m128i lane = _mm_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128);
  const __m128i set =
      _mm_cmpeq_epi16(_mm_and_si128(_mm_set1_epi16(static_cast<short>(bits)), lane), lane);
  const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                   _mm_blendv_epi8(_mm_set1_epi16(static_cast<short>(fill)), words, set));
#else
  for (int i = 0; i < 8; ++i) out[i] = bits >> i & 1 ? row[i] : fill;
#endif
}

// Copies a row, `fill` in the columns whose bit is not set.
template <typename Word>
void mask_by_bits(const Word* row, int64_t size, const uint64_t* bits, Word fill, Word* out) {
  int64_t v = 0;
  for (; v + 64 <= size; v += 64) {
    const uint64_t word = bits[v / 64];
    for (int i = 0; i < 64; i += 8) copy_eight(row + v + i, word >> i & 0xff, fill, out + v + i);
  }
  for (; v < size; ++v) out[v] = bits[v / 64] >> (v % 64) & 1 ? row[v] : fill;
}

template <typename Word>
const Masker<Word>& masker() {
  static constexpr Masker<Word> kMasker{mask_by_bits<Word>, fill_words<Word>};
  return kMasker;
}

template const Masker<uint32_t>& masker();
template const Masker<uint16_t>& masker();

}  // namespace plum::cpu::PLUM_ISA
