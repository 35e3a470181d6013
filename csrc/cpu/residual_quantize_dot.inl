// The screen on vector registers: 6 rows by 4 (of 16 floats) or 2 vectors of scores at a time.
// The variant defines before it: the type Sum, first_sum(level, at) that sums start from,
// multiply_add(a, b, sum), Scale(level, at) that makes scores of sums, and score_of(sum, scale,
// row), where `at` is the place of the first codeword in arrays [panels, lanes].

constexpr int kLanes = 64;
constexpr int kGroup = 6;
// Elements that codewords are fetched ahead.
constexpr int kAhead = 16;
constexpr int kTileVectors = kWidth == 16 ? 4 : 2;

// Nothing to set up.
struct ScreenState {};

// Folds the scores of a tile, of codewords at `at` on, into the best and second best of its lanes;
// of the first panel they are all there is. Inlined and unrolled, so that sums stay in registers.
template <bool kFirst>
__attribute__((always_inline)) inline void fold_tile(const Sum (&sums)[kGroup][kTileVectors],
                                                     const Level& level, int64_t at,
                                                     const Row* rows, Bits tag, float* best,
                                                     float* second) {
  const Bits keep = same_bits(~level.tag_mask);
#pragma GCC unroll 4
  for (int v = 0; v < kTileVectors; ++v) {
    const Scale scale(level, at + v * kWidth);
#pragma GCC unroll 6
    for (int i = 0; i < kGroup; ++i) {
      const int to = i * kLanes + v * kWidth;
      const Vec score = tagged(score_of(sums[i][v], scale, rows[i]), keep, tag);
      Vec top = score, next = broadcast(residual::kNone);
      if (!kFirst) {
        top = load(best + to);
        next = load(second + to);
        fold(score, top, next);
      }
      store(best + to, top);
      store(second + to, next);
    }
  }
}

// Scores kGroup rows against panels [first, last).
void screen(const float* operand, const Row* rows, int64_t elements, const Level& level,
            int64_t first, int64_t last, float* best, float* second) {
  for (int64_t panel = first; panel < last; ++panel) {
    const Bits tag = same_bits(static_cast<int32_t>(panel));
    for (int lane = 0; lane < kLanes; lane += kTileVectors * kWidth) {
      const float* codewords = level.panels + panel * elements * kLanes + lane;
      const int64_t at = panel * kLanes + lane;
      Sum sums[kGroup][kTileVectors];
      for (int i = 0; i < kGroup; ++i) {
        for (int v = 0; v < kTileVectors; ++v) {
          sums[i][v] = first_sum(level, at + v * kWidth);
        }
      }
      for (int64_t e = 0; e < elements; ++e) {
        Vec codeword[kTileVectors];
        for (int v = 0; v < kTileVectors; ++v) {
          codeword[v] = load(codewords + e * kLanes + v * kWidth);
          // Panels come from the second-level cache; a prefetch past the last one does nothing.
          __builtin_prefetch(codewords + (e + kAhead) * kLanes + v * kWidth);
        }
        for (int i = 0; i < kGroup; ++i) {
          const Vec t = broadcast(operand[i * elements + e]);
          for (int v = 0; v < kTileVectors; ++v) {
            sums[i][v] = multiply_add(t, codeword[v], sums[i][v]);
          }
        }
      }
      if (panel == 0) {
        fold_tile<true>(sums, level, at, rows, tag, best + lane, second + lane);
      } else {
        fold_tile<false>(sums, level, at, rows, tag, best + lane, second + lane);
      }
    }
  }
}
