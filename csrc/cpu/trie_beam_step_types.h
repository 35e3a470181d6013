// What the beam ops and their kernel variants exchange.
#pragma once

#include <cstdint>

namespace plum::cpu {
struct BeamStepInput;
}

namespace plum::cpu::beam {

// The vector parts for one instruction set; trie_beam_step_kernel.inl says what each computes.
struct Kernels {
  float (*largest)(const float* x, int64_t count);
  double (*sum_of_exponentials)(const float* x, int64_t count, float top, const void* next);
  int64_t (*find_above)(const float* x, int64_t count, const uint64_t* bits, float top,
                        float log_sum, float base, float threshold, int32_t* hits);
  void (*masked)(const float* x, int64_t count, const uint64_t* bits, float* out);
  void (*widen_bf16)(const uint16_t* row, int64_t count, float* out);
  void (*widen_fp16)(const uint16_t* row, int64_t count, float* out);
  void (*sort_few)(const uint64_t* keys, int64_t count, uint64_t* sorted);
};

// What sort_few takes at most, and the vector that find_above writes beyond its last hit.
constexpr int64_t kFew = 256, kHitPadding = 16;

// One logit as fp32, by its place in elements.
float logit(const BeamStepInput& input, int64_t at);

}  // namespace plum::cpu::beam
