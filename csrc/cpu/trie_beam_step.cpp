#include "plum/trie_beam_step.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "parallel.h"
#include "plum/cpu_features.h"
#include "trie_beam_step_types.h"
#include "trie_limits.h"

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
// A node with a mask is looked at by it if it holds at least one row in so many columns.
constexpr int64_t kSparse = 16;
// Candidates beyond k that are taken in between two rounds of selection.
constexpr int64_t kSpare = 64;
// How far below a beam's best score the k-th is looked for, and in how many halvings.
constexpr float kReach = 32;
constexpr int kHalvings = 10;

const beam::Kernels& active_kernels() {
#ifdef PLUM_X86
  if (active_isa() >= Isa::kAvx512) return avx512::beam_kernels();
  if (active_isa() == Isa::kAvx2) return avx2::beam_kernels();
#endif
  return generic::beam_kernels();
}

// Larger for a larger score, then for a lower ordinal, beam << 16 | code.
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
  Step(const BeamStepInput& input, const Trie& trie, const TrieFilter& filter, int64_t k,
       const BeamStepOutput& output)
      : in_(input),
        trie_(trie),
        out_(output),
        k_(k),
        kernels_(active_kernels()),
        limits_(trie, filter),
        ranges_(input.beams),
        nodes_(input.beams) {}

  void run(int64_t request) {
    l_ = in_.levels[request];
    best_.reset(k_);
    if (l_ >= 0 && l_ < static_cast<int64_t>(trie_.levels.size())) {
      level_ = &trie_.levels[l_];
      find_nodes(request);
      for (int64_t beam = 0; beam < in_.beams; ++beam) {
        const float base = in_.scores[request * in_.beams + beam];
        // Log-probabilities are not above 0.
        if (nodes_[beam].empty() || !(base > best_.threshold())) continue;
        limits_.enter(ranges_[beam]);
        const int64_t at = request * in_.batch_stride + beam * in_.beam_stride;
        if (in_.valid) {
          over_children(at, beam, base);
        } else {
          over_row(at, beam, base);
        }
      }
    }
    write(request);
  }

 private:
  void find_nodes(int64_t request) {
    limits_.deny(in_.dead, in_.denied, request, l_);
    const int64_t* states = in_.states + 2 * request * in_.beams;
    for (int64_t beam = 0; beam < in_.beams; ++beam) {
      ranges_[beam] = clamped(trie_, states + 2 * beam);
      nodes_[beam] = node_of(*level_, ranges_[beam]);
      __builtin_prefetch(level_->codes + nodes_[beam].first);
    }
    if (!in_.valid) return;
    // Where beams have few children each, their logits are far apart.
    for (int64_t beam = 0; beam < in_.beams; ++beam) {
      if (nodes_[beam].empty()) continue;
      const int64_t at = request * in_.batch_stride + beam * in_.beam_stride + in_.columns[l_];
      __builtin_prefetch(element(at + level_->codes[nodes_[beam].first]));
    }
  }

  const void* element(int64_t at) const {
    return static_cast<const char*>(in_.logits) + at * (in_.type == RowType::kFloat32 ? 4 : 2);
  }

  // Returns `count` logits from position `at` as fp32, widened into row_ where they are not.
  const float* row(int64_t at, int64_t count) {
    if (in_.type == RowType::kFloat32) return static_cast<const float*>(in_.logits) + at;
    widen(static_cast<const uint16_t*>(in_.logits) + at, count, room(row_, count));
    return row_.data();
  }

  void widen(const uint16_t* from, int64_t count, float* to) const {
    (in_.type == RowType::kBfloat16 ? kernels_.widen_bf16 : kernels_.widen_fp16)(from, count, to);
  }

  template <typename T>
  static T* room(std::vector<T>& scratch, int64_t count) {
    scratch.resize(std::max<size_t>(count, scratch.size()));
    return scratch.data();
  }

  // The mask of a beam that has children enough for it, or null.
  const uint64_t* wide_mask(int64_t beam) {
    const int64_t count = nodes_[beam].last - nodes_[beam].first;
    if (count * kSparse < level_->size) return nullptr;
    return limits_.mask(l_, ranges_[beam]);
  }

  void over_row(int64_t at, int64_t beam, float base) {
    const float* logits = row(at, in_.width);
    const float top = kernels_.largest(logits, in_.width);
    // A prefetch of an address that is not there does nothing.
    const void* next = element(at + in_.beam_stride);
    const auto log_sum =
        static_cast<float>(std::log(kernels_.sum_of_exponentials(logits, in_.width, top, next)));
    if (!(base - log_sum > best_.threshold())) return;
    const float* columns = logits + in_.columns[l_];
    if (const uint64_t* mask = wide_mask(beam)) {
      take(beam, base, columns, level_->size, mask, top, log_sum, [](int64_t i) { return i; });
      return;
    }
    const bool limited = limits_.filtered() || limits_.denied();
    if (limited && best_.threshold() > kNever) {
      const int64_t count = list_children(beam, false);
      gather(columns, count);
      // Few children are above the threshold; which of them may be reached is looked up.
      const int64_t hits =
          find_above(values_.data(), count, nullptr, top, log_sum, base, best_.threshold());
      if (hits <= 2 * k_) {
        for (int64_t h = 0; h < hits; ++h) {
          const int64_t code = codes_[hits_[h]];
          const Rows child = child_rows(*level_, nodes_[beam], code);
          // Where the state is no node, codes do not rise, and one may not be found.
          if (child.low == child.high || !limits_.leaves(child)) continue;
          push(beam, code, base + ((values_[hits_[h]] - top) - log_sum));
        }
        return;
      }
    }
    const int64_t count = list_children(beam, limited);
    gather(columns, count);
    take_children(beam, base, count, top, log_sum);
  }

  void gather(const float* columns, int64_t count) {
    float* values = room(values_, count);
    for (int64_t i = 0; i < count; ++i) values[i] = columns[codes_[i]];
  }

  void over_children(int64_t at, int64_t beam, float base) {
    at += in_.columns[l_];
    if (const uint64_t* mask = wide_mask(beam)) {
      const int64_t size = level_->size;
      kernels_.masked(row(at, size), size, mask, room(values_, size));
      const float top = kernels_.largest(values_.data(), size);
      take(beam, base, values_.data(), size, nullptr, top, log_of_sum(size, top),
           [](int64_t i) { return i; });
      return;
    }
    const int64_t count = list_children(beam, limits_.filtered() || limits_.denied());
    if (in_.type == RowType::kFloat32) {
      gather(static_cast<const float*>(in_.logits) + at, count);
    } else {
      const uint16_t* columns = static_cast<const uint16_t*>(in_.logits) + at;
      uint16_t* halves = room(halves_, count);
      for (int64_t i = 0; i < count; ++i) halves[i] = columns[codes_[i]];
      widen(halves, count, room(values_, count));
    }
    if (count == 0) return;
    if (count == 1) {
      // A lone child has all the probability, unless its logit is not finite.
      push(beam, codes_[0], base + (values_[0] - values_[0]));
      return;
    }
    const float top = kernels_.largest(values_.data(), count);
    take_children(beam, base, count, top, log_of_sum(count, top));
  }

  float log_of_sum(int64_t count, float top) const {
    const float* values = values_.data();
    return static_cast<float>(std::log(kernels_.sum_of_exponentials(values, count, top, values)));
  }

  // Points codes_ to the codes of a beam's children, which rise, all or those that may be reached;
  // returns how many.
  int64_t list_children(int64_t beam, bool limited) {
    const Node node = nodes_[beam];
    const uint16_t* codes = level_->codes + node.first;
    const int64_t count = node.last - node.first;
    codes_ = codes;
    if (!limited && (level_->starts != nullptr || count == 1)) return count;
    uint16_t* list = room(list_, count);
    int64_t found = 0;
    visit_children(*level_, node, [&](int64_t code, Rows rows) {
      list[found] = static_cast<uint16_t>(code);
      found += !limited || limits_.leaves(rows);
    });
    codes_ = list;
    return found;
  }

  void push(int64_t beam, int64_t code, float score) {
    // The threshold may have risen since.
    if (score > best_.threshold()) best_.push(score, static_cast<uint64_t>(beam << 16 | code));
  }

  int64_t find_above(const float* x, int64_t count, const uint64_t* bits, float top, float log_sum,
                     float base, float threshold) {
    return kernels_.find_above(x, count, bits, top, log_sum, base, threshold,
                               room(hits_, count + kHitPadding));
  }

  // Finds the scores of x[0..count) above the threshold, of those whose bit is set if there are
  // bits, but not many more than the k best; returns how many.
  int64_t find(const float* x, int64_t count, const uint64_t* bits, float top, float log_sum,
               float base) {
    const auto above = [&](float threshold) {
      return find_above(x, count, bits, top, log_sum, base, threshold);
    };
    int64_t hits = above(best_.threshold());
    if (hits <= 2 * k_) return hits;
    float high = base - log_sum, low = std::max(best_.threshold(), high - kReach);
    for (int round = 0; round < kHalvings; ++round) {
      const float middle = low + (high - low) / 2;
      hits = above(middle);
      (hits < k_ ? high : low) = middle;
      if (hits >= k_ && hits <= 2 * k_) break;
    }
    if (hits < k_ || hits > 2 * k_) hits = above(low);
    if (hits < k_) return above(best_.threshold());
    best_.raise_threshold(low);
    return hits;
  }

  // Pushes the best of x[0..count), of those whose bit is set if there are bits: they are legal
  // children or -inf. code_of gives the code of each.
  template <typename CodeOf>
  void take(int64_t beam, float base, const float* x, int64_t count, const uint64_t* bits,
            float top, float log_sum, const CodeOf& code_of) {
    const int64_t hits = find(x, count, bits, top, log_sum, base);
    for (int64_t h = 0; h < hits; ++h) {
      push(beam, code_of(hits_[h]), base + ((x[hits_[h]] - top) - log_sum));
    }
  }

  void take_children(int64_t beam, float base, int64_t count, float top, float log_sum) {
    take(beam, base, values_.data(), count, nullptr, top, log_sum,
         [this](int64_t i) { return codes_[i]; });
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
      const int64_t beam = ordinal >> 16, code = ordinal & 0xffff;
      const Rows child = child_rows(*level_, nodes_[beam], code);
      out_.tokens[at] = code;
      out_.parents[at] = beam;
      out_.scores[at] = score_of(keys[j]);
      out_.states[2 * at] = child.low;
      out_.states[2 * at + 1] = child.high;
    }
  }

  const BeamStepInput& in_;
  const Trie& trie_;
  const BeamStepOutput& out_;
  const int64_t k_;
  const beam::Kernels& kernels_;
  int64_t l_ = 0;
  const TrieLevel* level_ = nullptr;
  Limits limits_;
  std::vector<Rows> ranges_;
  std::vector<Node> nodes_;
  const uint16_t* codes_ = nullptr;
  std::vector<uint16_t> list_, halves_;
  std::vector<float> row_, values_;
  std::vector<int32_t> hits_;
  Best best_;
};

}  // namespace

float beam::logit(const BeamStepInput& input, int64_t at) {
  if (input.type == RowType::kFloat32) return static_cast<const float*>(input.logits)[at];
  const auto* half = static_cast<const uint16_t*>(input.logits) + at;
  float value;
  const Kernels& kernels = active_kernels();
  (input.type == RowType::kBfloat16 ? kernels.widen_bf16 : kernels.widen_fp16)(half, 1, &value);
  return value;
}

void trie_beam_step(const BeamStepInput& input, const Trie& trie, const TrieFilter& filter,
                    int64_t k, const BeamStepOutput& output, int threads) {
  const int64_t logits = input.batch * input.beams * input.width;
  const int64_t wanted = std::min(input.batch, logits / kLogitsPerThread);
  const int workers = static_cast<int>(std::clamp<int64_t>(wanted, 1, threads));
  parallel(workers, [&](int worker) {
    Step step(input, trie, filter, k, output);
    const int64_t end = input.batch * (worker + 1) / workers;
    for (int64_t b = input.batch * worker / workers; b < end; ++b) step.run(b);
  });
}

}  // namespace plum::cpu
