// One step of beam search over the legal children of the beams.
#pragma once

#include <cstdint>

#include "plum/row_type.h"
#include "plum/trie_index.h"

namespace plum::cpu {

// B requests of W beams each. Strides are in elements; the columns of a row are contiguous.
struct BeamStepInput {
  const void* logits;  // [B, W, width]
  RowType type;
  int64_t width, batch_stride, beam_stride;
  const float* scores;    // [B, W]
  const int64_t* states;  // [B, W, 2] rows
  int64_t batch, beams;
  RowLevels levels;        // of each request; one that the trie has not has no children
  const int64_t* columns;  // [levels of the trie] column of code 0
  bool valid;              // softmax over the legal children instead of the row
  const int64_t* dead;     // [B, levels of the trie, denied] what trie_deny wrote; or null
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
// not depend on instruction set, threads or batch. `beams` is at most 2^16.
void trie_beam_step(const BeamStepInput& input, const Trie& trie, const TrieFilter& filter,
                    int64_t k, const BeamStepOutput& output, int threads);

}  // namespace plum::cpu
