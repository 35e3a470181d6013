#include <immintrin.h>

#include <cstdint>

#include "residual_quantize_types.h"

namespace plum::cpu::amx_bf16 {
namespace {

#include "residual_quantize_bf16.inl"

// Two by two tiles of 16 rows and 16 codewords.
constexpr int kLanes = 32;
constexpr int kGroup = 32;
// Elements a tile holds of a row.
constexpr int kTile = 16;

// Eight tiles of 16 rows of 64 bytes.
class ScreenState {
 public:
  ScreenState() {
    alignas(64) uint8_t config[64] = {1};
    for (int tile = 0; tile < 8; ++tile) {
      config[16 + 2 * tile] = 64;
      config[48 + tile] = 16;
    }
    _tile_loadconfig(config);
  }
  ~ScreenState() { _tile_release(); }
};

// Writes the scores [kGroup, kLanes] of a panel.
void multiply(const float* operand, int64_t elements, const float* codewords, const float* bias,
              float* scores) {
  const int64_t row_bytes = elements * sizeof(float), panel_bytes = kLanes * sizeof(float);
  // A stride of zero repeats the bias in every row.
  _tile_loadd(0, bias, 0);
  _tile_loadd(1, bias + kTile, 0);
  _tile_loadd(2, bias, 0);
  _tile_loadd(3, bias + kTile, 0);
  for (int64_t e = 0; e < elements; e += kTile) {
    _tile_loadd(4, operand + e, row_bytes);
    _tile_loadd(5, operand + kTile * elements + e, row_bytes);
    _tile_loadd(6, codewords + e * kLanes, panel_bytes);
    _tile_loadd(7, codewords + e * kLanes + kTile, panel_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, scores, panel_bytes);
  _tile_stored(1, scores + kTile, panel_bytes);
  _tile_stored(2, scores + kTile * kLanes, panel_bytes);
  _tile_stored(3, scores + kTile * kLanes + kTile, panel_bytes);
}

// Scores kGroup rows against panels [first, last), a few of them between two visits to the best:
// before the first panel there is none.
void screen(const float* operand, const Row*, int64_t elements, const Level& level, int64_t first,
            int64_t last, float* best, float* second) {
  constexpr int kScores = kGroup * kLanes, kPanels = 4;
  alignas(64) float scores[kPanels * kScores];
  const Bits keep = same_bits(~level.tag_mask);
  for (; first < last; first += kPanels) {
    const int64_t panels = smaller_of(kPanels, last - first);
    for (int64_t j = 0; j < panels; ++j) {
      const int64_t at = (first + j) * kLanes;
      multiply(operand, elements, level.panels + at * elements, level.bias + at,
               scores + j * kScores);
    }
    for (int at = 0; at < kScores; at += kWidth) {
      Vec top = broadcast(residual::kNone), next = top;
      if (first > 0) {
        top = load(best + at);
        next = load(second + at);
      }
      for (int64_t j = 0; j < panels; ++j) {
        const Bits tag = same_bits(static_cast<int32_t>(first + j));
        fold(tagged(load(scores + j * kScores + at), keep, tag), top, next);
      }
      store(best + at, top);
      store(second + at, next);
    }
  }
}

#include "residual_quantize_kernel.inl"

}  // namespace

int64_t residual_quantize_block(const Problem& problem, int64_t begin, int64_t count, int64_t next,
                                float* workspace, int64_t* compared) {
  return quantize_block(problem, begin, count, next, workspace, compared);
}

}  // namespace plum::cpu::amx_bf16
