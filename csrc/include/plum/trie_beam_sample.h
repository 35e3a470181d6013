// One step of sampling SIDs without replacement: stochastic beam search.
#pragma once

#include <cstdint>

#include "plum/trie_beam_step.h"

namespace plum::cpu {

// Beside what trie_beam_step takes (`valid` is meant whatever it says):
struct BeamSampleInput {
  BeamStepInput step;
  const double* keys;    // [B, W] perturbed log-probabilities of the beams
  const int64_t* seeds;  // [B]
  double temperature;
};

struct BeamSampleOutput {
  BeamStepOutput step;
  double* keys;  // [B, k], falling; -inf where there is no child
};

// Draws the Gumbel noise of each legal child, from its request's seed and its prefix alone, shifts
// the perturbed log-probabilities of a beam's children so that their largest is the beam's key, and
// keeps the k largest of each request. Ties go to the lower beam, then the lower code.
void trie_beam_sample(const BeamSampleInput& input, const Trie& trie, const TrieFilter& filter,
                      int64_t k, const BeamSampleOutput& output, int threads);

}  // namespace plum::cpu
