// One step of beam search over the legal children of the beams.
#pragma once

#include <cstdint>

#include "plum/trie_level.h"

namespace plum::cpu {

enum class LogitType : int { kFp32 = 0, kBf16 = 1, kFp16 = 2 };

// B requests of W beams each. Strides are in elements; the columns of a row are contiguous.
struct BeamStepInput {
  const void* logits;  // [B, W, width]
  LogitType type;
  int64_t width, batch_stride, beam_stride;
  const float* scores;    // [B, W]
  const int64_t* states;  // [B, W, 2] rows
  int64_t batch, beams;
  int64_t offset;       // column of code 0
  bool valid;           // softmax over the legal children instead of the row
  const int64_t* rank;  // [rows + 1] allowed rows before each row, or null
  const int64_t* deny;  // [B, denied] rising, each once but for values of `rows` or more; or null
  int64_t denied;
};

// Best first; the places that no child takes hold token -1, parent 0, score -inf, state [0, 0).
struct BeamStepOutput {
  int64_t* tokens;   // [B, k]
  int64_t* parents;  // [B, k]
  float* scores;     // [B, k]
  int64_t* states;   // [B, k, 2]
};

// Keeps the k best children of each request: score + ((x - top) - log(sum of exp(x - top))), a NaN
// or -inf never. Ties go to the lower beam, then the lower code. The sum has a fixed order: bits do
// not depend on instruction set, threads or batch.
// Throws std::length_error when the beams of a request have 2^32 children or more.
void trie_beam_step(const BeamStepInput& input, const TrieLevel& level, int64_t k,
                    const BeamStepOutput& output, int threads);

}  // namespace plum::cpu
