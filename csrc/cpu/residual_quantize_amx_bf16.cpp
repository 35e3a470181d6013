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

// Scores kGroup rows against panels [first, last).
void screen(const float* operand, int64_t elements, const Level& level, int64_t first, int64_t last,
            float* best, float* second) {
  const Bits keep = same_bits(~level.tag_mask);
  const int64_t row_bytes = elements * sizeof(float), panel_bytes = kLanes * sizeof(float);
  alignas(64) float scores[kGroup * kLanes];
  for (int64_t panel = first; panel < last; ++panel) {
    const float* codewords = level.panels + panel * elements * kLanes;
    const float* bias = level.bias + panel * kLanes;
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
    const Bits tag = same_bits(static_cast<int32_t>(panel));
    for (int at = 0; at < kGroup * kLanes; at += kWidth) {
      fold(tagged(load(scores + at), keep, tag), best + at, second + at);
    }
  }
}

#include "residual_quantize_kernel.inl"

}  // namespace

int64_t residual_quantize_block(const Problem& problem, int64_t begin, int64_t count,
                                float* workspace) {
  return quantize_block(problem, begin, count, workspace);
}

}  // namespace plum::cpu::amx_bf16
