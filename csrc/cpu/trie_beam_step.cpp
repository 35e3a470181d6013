#include "plum/trie_beam_step.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <stdexcept>
#include <vector>

#include "parallel.h"
#include "plum/cpu_features.h"
#include "trie_beam_step_types.h"
#include "trie_search.h"

namespace plum::cpu {

#define PLUM_DECLARE(isa)              \
  namespace isa {                      \
  const beam::Kernels& beam_kernels(); \
  }
PLUM_DECLARE(generic)
#ifdef PLUM_X86
PLUM_DECLARE(avx2)
PLUM_DECLARE(avx512)
#endif
#undef PLUM_DECLARE

namespace {

using beam::kFew;
using beam::kHitPadding;

constexpr float kNever = -std::numeric_limits<float>::infinity();
// Below this many logits a thread, starting threads costs more than it saves.
constexpr int64_t kLogitsPerThread = 1 << 16;
// Children at least one column in so many are searched by column, once a threshold stands.
constexpr int64_t kSparse = 4;
// Candidates beyond k that are taken in between two rounds of selection.
constexpr int64_t kSpare = 64;
// How far below a beam's best score the k-th is looked for, and in how many halvings.
constexpr float kReach = 32;
constexpr int kHalvings = 10;

const beam::Kernels& kernels() {
#ifdef PLUM_X86
  switch (active_isa()) {
    case Isa::kAmxBf16:
    case Isa::kAvx512Bf16:
    case Isa::kAvx512:
      return avx512::beam_kernels();
    case Isa::kAvx2:
      return avx2::beam_kernels();
    case Isa::kGeneric:
      break;
  }
#endif
  return generic::beam_kernels();
}

// Larger for a larger score, then for a lower ordinal: children count by beam, then by code.
uint64_t make_key(float score, uint64_t ordinal) {
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof bits);
  bits = bits >> 31 ? ~bits : bits | 0x80000000u;
  return uint64_t{bits} << 32 | (0xffffffffu - ordinal);
}

float score_of(uint64_t key) {
  auto bits = static_cast<uint32_t>(key >> 32);
  bits = bits >> 31 ? bits & 0x7fffffffu : ~bits;
  float score;
  std::memcpy(&score, &bits, sizeof score);
  return score;
}

uint64_t ordinal_of(uint64_t key) { return 0xffffffffu - (key & 0xffffffffu); }

// The k largest keys of a stream.
class Best {
 public:
  void reset(int64_t k) {
    k_ = k;
    keys_.clear();
    threshold_ = kNever;
  }

  // A score not above it cannot be among the k best any more.
  float threshold() const { return threshold_; }

  // To be called before k scores above `score` are pushed.
  void raise_threshold(float score) { threshold_ = std::max(threshold_, score); }

  // Takes a score above the threshold; ordinals rise from call to call.
  void push(float score, uint64_t ordinal) {
    // Plus zero: -0 and +0 are one score.
    keys_.push_back(make_key(score + 0.0f, ordinal));
    if (static_cast<int64_t>(keys_.size()) >= 2 * k_ + kSpare) select();
  }

  // Returns what is kept, the best first.
  const std::vector<uint64_t>& sorted(const beam::Kernels& kernels) {
    if (static_cast<int64_t>(keys_.size()) > k_) select();
    const auto count = static_cast<int64_t>(keys_.size());
    if (std::is_sorted(keys_.begin(), keys_.end(), std::greater<>())) return keys_;
    if (count > kFew) {
      std::sort(keys_.begin(), keys_.end(), std::greater<>());
      return keys_;
    }
    sorted_.resize(count);
    kernels.sort_few(keys_.data(), count, sorted_.data());
    return sorted_;
  }

 private:
  void select() {
    const auto kth = keys_.begin() + (k_ - 1);
    std::nth_element(keys_.begin(), kth, keys_.end(), std::greater<>());
    threshold_ = score_of(*kth);
    keys_.resize(k_);
  }

  int64_t k_ = 0;
  float threshold_ = kNever;
  std::vector<uint64_t> keys_, sorted_;
};

class Step {
 public:
  Step(const BeamStepInput& input, const TrieLevel& level, int64_t k, const BeamStepOutput& output)
      : in_(input),
        level_(level),
        out_(output),
        k_(k),
        kernels_(kernels()),
        first_(input.beams),
        last_(input.beams),
        before_(input.beams + 1) {}

  void run(int64_t request) {
    find_children(request);
    best_.reset(k_);
    for (int64_t beam = 0; beam < in_.beams; ++beam) {
      const float base = in_.scores[request * in_.beams + beam];
      // Log-probabilities are not above 0.
      if (first_[beam] == last_[beam] || !(base > best_.threshold())) continue;
      const int64_t at = request * in_.batch_stride + beam * in_.beam_stride;
      if (in_.valid) {
        over_children(at, beam, base);
      } else {
        over_row(at, beam, base);
      }
    }
    write(request);
  }

 private:
  void find_children(int64_t request) {
    const int64_t* states = in_.states + 2 * request * in_.beams;
    int64_t before = 0;
    for (int64_t begin = 0; begin < in_.beams; begin += kSearches) {
      const int64_t count = std::min(kSearches, in_.beams - begin);
      child_ranges(level_, states + 2 * begin, count, &first_[begin], &last_[begin]);
      for (int64_t i = begin; i < begin + count; ++i) {
        before_[i] = before;
        before += last_[i] - first_[i];
        __builtin_prefetch(level_.codes + first_[i]);
      }
    }
    before_[in_.beams] = before;
    if (before >> 32) {
      throw std::length_error("trie_beam_step: expected less than 2^32 children a request, got " +
                              std::to_string(before));
    }
    if (in_.deny != nullptr) {
      denied_ = in_.deny + request * in_.denied;
      denied_end_ = denied_ + in_.denied;
    }
    if (!in_.valid) return;
    // Where beams have few children each, their logits are far apart.
    for (int64_t beam = 0; beam < in_.beams; ++beam) {
      if (first_[beam] == last_[beam]) continue;
      const int64_t at = request * in_.batch_stride + beam * in_.beam_stride + in_.offset +
                         level_.codes[first_[beam]];
      __builtin_prefetch(element(at));
    }
  }

  // The denied rows of the request in the beam's range, where there are any.
  void narrow_denied(int64_t beam, const int64_t** begin, const int64_t** end) const {
    *begin = *end = nullptr;
    if (in_.deny == nullptr) return;
    *begin = std::lower_bound(denied_, denied_end_, level_.starts[first_[beam]]);
    *end = std::lower_bound(*begin, denied_end_, level_.starts[last_[beam]]);
  }

  bool limited() const { return in_.rank != nullptr || in_.deny != nullptr; }

  // Whether a row is left below the edge, after the filter and the beam's denied rows.
  bool is_left(int64_t edge, const int64_t* denied, const int64_t* denied_end) const {
    const int64_t low = level_.starts[edge], high = level_.starts[edge + 1];
    int64_t left = in_.rank == nullptr ? high - low : in_.rank[high] - in_.rank[low];
    if (left > 0 && denied != denied_end) {
      const int64_t* from = std::lower_bound(denied, denied_end, low);
      left -= std::lower_bound(from, denied_end, high) - from;
    }
    return left > 0;
  }

  const void* element(int64_t at) const {
    return static_cast<const char*>(in_.logits) + at * (in_.type == LogitType::kFp32 ? 4 : 2);
  }

  // Returns `count` logits from position `at` as fp32, widened into row_ where they are not.
  const float* row(int64_t at, int64_t count) {
    if (in_.type == LogitType::kFp32) return static_cast<const float*>(in_.logits) + at;
    row_.resize(std::max<int64_t>(count, row_.size()));
    const auto widen = in_.type == LogitType::kBf16 ? kernels_.widen_bf16 : kernels_.widen_fp16;
    widen(static_cast<const uint16_t*>(in_.logits) + at, count, row_.data());
    return row_.data();
  }

  void over_row(int64_t at, int64_t beam, float base) {
    const float* logits = row(at, in_.width);
    const float top = kernels_.largest(logits, in_.width);
    // A prefetch of an address that is not there does nothing.
    const void* next = element(at + in_.beam_stride);
    const auto log_sum =
        static_cast<float>(std::log(kernels_.sum_of_exponentials(logits, in_.width, top, next)));
    if (!(base - log_sum > best_.threshold())) return;
    const int32_t* codes = level_.codes + first_[beam];
    const int64_t count = last_[beam] - first_[beam];
    const float* columns = logits + in_.offset;
    const int64_t span = int64_t{codes[count - 1]} - codes[0] + 1;
    const bool by_column = span == count || (best_.threshold() > kNever && span <= kSparse * count);
    if (!by_column) {
      const float* values = gather(columns, codes, count);
      take(beam, base, values, count, top, log_sum, !limited(), [](int64_t i) { return i; });
      return;
    }
    // Few columns are above the threshold; which of them are children is looked up.
    const bool legal = span == count && !limited();
    take(beam, base, columns + codes[0], span, top, log_sum, legal,
         [&](int64_t i) { return span == count ? i : find_code(codes, 0, count, codes[0] + i); });
  }

  void over_children(int64_t at, int64_t beam, float base) {
    const int32_t* codes = level_.codes + first_[beam];
    const int64_t count = last_[beam] - first_[beam];
    const float* values;
    if (in_.type == LogitType::kFp32) {
      values = gather(static_cast<const float*>(in_.logits) + at + in_.offset, codes, count);
    } else {
      halves_.resize(std::max<int64_t>(count, halves_.size()));
      const uint16_t* columns = static_cast<const uint16_t*>(in_.logits) + at + in_.offset;
      for (int64_t i = 0; i < count; ++i) halves_[i] = columns[codes[i]];
      reserve_values(count);
      const auto widen = in_.type == LogitType::kBf16 ? kernels_.widen_bf16 : kernels_.widen_fp16;
      widen(halves_.data(), count, values_.data());
      values = values_.data();
    }
    if (limited()) {
      const int64_t *denied, *denied_end;
      narrow_denied(beam, &denied, &denied_end);
      for (int64_t i = 0; i < count; ++i) {
        if (!is_left(first_[beam] + i, denied, denied_end)) values_[i] = kNever;
      }
    }
    if (count == 1) {
      // A lone child has all the probability, unless its logit is not finite.
      const float score = base + (values[0] - values[0]);
      if (score > best_.threshold()) best_.push(score, before_[beam]);
      return;
    }
    const float top = kernels_.largest(values, count);
    const auto log_sum =
        static_cast<float>(std::log(kernels_.sum_of_exponentials(values, count, top, values)));
    take(beam, base, values, count, top, log_sum, true, [](int64_t i) { return i; });
  }

  void reserve_values(int64_t count) { values_.resize(std::max<int64_t>(count, values_.size())); }

  const float* gather(const float* columns, const int32_t* codes, int64_t count) {
    reserve_values(count);
    for (int64_t i = 0; i < count; ++i) values_[i] = columns[codes[i]];
    return values_.data();
  }

  // Finds the scores above the threshold, but where each position is a legal child not many more
  // than the k best; returns how many.
  int64_t find(float base, const float* x, int64_t count, float top, float log_sum, bool legal) {
    hits_.resize(std::max<int64_t>(count + kHitPadding, hits_.size()));
    const auto find_above = [&](float threshold) {
      return kernels_.find_above(x, count, top, log_sum, base, threshold, hits_.data());
    };
    int64_t hits = find_above(best_.threshold());
    if (!legal || hits <= 2 * k_) return hits;
    float high = base - log_sum, low = std::max(best_.threshold(), high - kReach);
    for (int round = 0; round < kHalvings; ++round) {
      const float middle = low + (high - low) / 2;
      hits = find_above(middle);
      (hits < k_ ? high : low) = middle;
      if (hits >= k_ && hits <= 2 * k_) break;
    }
    if (hits < k_ || hits > 2 * k_) hits = find_above(low);
    if (hits < k_) return find_above(best_.threshold());
    best_.raise_threshold(low);
    return hits;
  }

  // Pushes the legal children among x[0..count); child_of gives the child of a position, or -1.
  //   legal  whether each position is a legal child, or has a logit of -inf
  template <typename ChildOf>
  void take(int64_t beam, float base, const float* x, int64_t count, float top, float log_sum,
            bool legal, const ChildOf& child_of) {
    const int64_t hits = find(base, x, count, top, log_sum, legal);
    if (hits == 0) return;
    const bool check = limited() && !legal;
    const int64_t *denied = nullptr, *denied_end = nullptr;
    if (check) narrow_denied(beam, &denied, &denied_end);
    for (int64_t h = 0; h < hits; ++h) {
      const float score = base + ((x[hits_[h]] - top) - log_sum);
      // The threshold may have risen since.
      if (!(score > best_.threshold())) continue;
      const int64_t child = child_of(hits_[h]);
      if (child < 0 || (check && !is_left(first_[beam] + child, denied, denied_end))) continue;
      best_.push(score, before_[beam] + child);
    }
  }

  // The beam of a child, by the number of children before it.
  int64_t owner(int64_t ordinal) const {
    // Where beams have a child each, that is the beam.
    if (ordinal < in_.beams && before_[ordinal] == ordinal && before_[ordinal + 1] > ordinal) {
      return ordinal;
    }
    return std::upper_bound(before_.begin(), before_.end(), ordinal) - before_.begin() - 1;
  }

  void write(int64_t request) {
    const std::vector<uint64_t>& keys = best_.sorted(kernels_);
    const auto found = static_cast<int64_t>(keys.size());
    for (int64_t j = 0; j < k_; ++j) {
      const int64_t at = request * k_ + j;
      if (j >= found) {
        out_.tokens[at] = -1;
        out_.parents[at] = out_.states[2 * at] = out_.states[2 * at + 1] = 0;
        out_.scores[at] = kNever;
        continue;
      }
      const auto ordinal = static_cast<int64_t>(ordinal_of(keys[j]));
      const int64_t beam = owner(ordinal);
      const int64_t edge = first_[beam] + (ordinal - before_[beam]);
      out_.tokens[at] = level_.codes[edge];
      out_.parents[at] = beam;
      out_.scores[at] = score_of(keys[j]);
      out_.states[2 * at] = level_.starts[edge];
      out_.states[2 * at + 1] = level_.starts[edge + 1];
    }
  }

  const BeamStepInput& in_;
  const TrieLevel& level_;
  const BeamStepOutput& out_;
  const int64_t k_;
  const beam::Kernels& kernels_;
  std::vector<int64_t> first_, last_, before_;  // a beam's edges, and the children of those before
  const int64_t *denied_ = nullptr, *denied_end_ = nullptr;
  std::vector<float> row_, values_;
  std::vector<uint16_t> halves_;
  std::vector<int32_t> hits_;
  Best best_;
};

}  // namespace

void trie_beam_step(const BeamStepInput& input, const TrieLevel& level, int64_t k,
                    const BeamStepOutput& output, int threads) {
  const int64_t logits = input.batch * input.beams * input.width;
  const int64_t wanted = std::min(input.batch, logits / kLogitsPerThread);
  const int workers = static_cast<int>(std::clamp<int64_t>(wanted, 1, threads));
  parallel(workers, [&](int worker) {
    Step step(input, level, k, output);
    const int64_t end = input.batch * (worker + 1) / workers;
    for (int64_t b = input.batch * worker / workers; b < end; ++b) step.run(b);
  });
}

}  // namespace plum::cpu
