// The screen on vector registers: 6 rows by 4 (of 16 floats) or 2 vectors of scores at a time.
// The variant defines before it: the type Sum, first_sum(level, at) that sums start from,
// multiply_add(a, b, sum), and score_of(sum, level, at, row), where `at` is the place of the first
// codeword in arrays [panels, lanes].

constexpr int kLanes = 64;
constexpr int kGroup = 6;
// Elements that codewords are fetched ahead.
constexpr int kAhead = 16;
constexpr int kTileVectors = kWidth == 16 ? 4 : 2;

// Nothing to set up.
struct ScreenState {};

// Scores kGroup rows against panels [first, last).
void screen(const float* operand, const Row* rows, int64_t elements, const Level& level,
            int64_t first, int64_t last, float* best, float* second) {
  const Bits keep = same_bits(~level.tag_mask);
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
      for (int i = 0; i < kGroup; ++i) {
        for (int v = 0; v < kTileVectors; ++v) {
          const int to = i * kLanes + lane + v * kWidth;
          const Vec found = score_of(sums[i][v], level, at + v * kWidth, rows[i]);
          Vec top = load(best + to), next = load(second + to);
          fold(tagged(found, keep, tag), top, next);
          store(best + to, top);
          store(second + to, next);
        }
      }
    }
  }
}
