#include "plum/trie_beam_sample.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "parallel.h"
#include "trie_beam_step_types.h"
#include "trie_limits.h"

namespace plum::cpu {
namespace {

constexpr double kNever = -std::numeric_limits<double>::infinity();
// Below this many logits a thread, starting threads costs more than it saves.
constexpr int64_t kLogitsPerThread = 1 << 12;

// The finalizer of splitmix64 (Steele et al. 2014).
uint64_t mixed(uint64_t z) {
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return z ^ z >> 31;
}

// Gumbel noise of the child of a node by a code: the same wherever the prefix comes up.
double gumbel(uint64_t seed, int64_t node, int64_t level, int64_t code) {
  const auto place = static_cast<uint64_t>(node << 20 | level << 16 | code);
  const uint64_t bits = mixed(mixed(place) ^ seed);
  // The sum of the highest bits is rounded up to 2^53.
  const double uniform = std::min((static_cast<double>(bits >> 11) + 0.5) * 0x1p-53, 1 - 0x1p-53);
  return -std::log(-std::log(uniform));
}

struct Candidate {
  double key, score;
  int64_t beam, code;
  Rows rows;
};

bool better(const Candidate& a, const Candidate& b) {
  if (a.key != b.key) return a.key > b.key;
  return a.beam != b.beam ? a.beam < b.beam : a.code < b.code;
}

class Sample {
 public:
  Sample(const BeamSampleInput& input, const Trie& trie, const TrieFilter& filter, int64_t k,
         const BeamSampleOutput& output)
      : in_(input), trie_(trie), out_(output), k_(k), limits_(trie, filter) {}

  void run(int64_t request) {
    const BeamStepInput& step = in_.step;
    const int64_t l = step.levels[request];
    found_.clear();
    if (l >= 0 && l < static_cast<int64_t>(trie_.levels.size())) {
      limits_.deny(step.dead, step.denied, request, l);
      for (int64_t beam = 0; beam < step.beams; ++beam) draw(request, beam, l);
    }
    const int64_t kept = std::min<int64_t>(k_, found_.size());
    std::partial_sort(found_.begin(), found_.begin() + kept, found_.end(), better);
    write(request, kept);
  }

 private:
  void draw(int64_t request, int64_t beam, int64_t l) {
    const BeamStepInput& step = in_.step;
    const TrieLevel& level = trie_.levels[l];
    const int64_t place = request * step.beams + beam;
    const double parent = in_.keys[place];
    const Rows range = clamped(trie_, step.states + 2 * place);
    if (range.low == range.high || !(parent > kNever)) return;
    limits_.enter(range);
    children_.clear();
    visit_children(level, node_of(level, range), [&](int64_t code, Rows rows) {
      if (limits_.leaves(rows)) children_.push_back({0, 0, beam, code, rows});
    });
    const int64_t at = request * step.batch_stride + beam * step.beam_stride + step.columns[l];
    double top = kNever, sum = 0;
    for (Candidate& child : children_) {
      child.score = beam::logit(step, at + child.code) / in_.temperature;
      top = std::max(top, child.score);
    }
    for (const Candidate& child : children_) sum += std::exp(child.score - top);
    const uint64_t seed = mixed(static_cast<uint64_t>(in_.seeds[request]));
    double largest = kNever;
    for (Candidate& child : children_) {
      child.score = step.scores[place] + (child.score - top - std::log(sum));
      child.key = child.score + gumbel(seed, range.low, l, child.code);
      largest = std::max(largest, child.key);
    }
    for (Candidate& child : children_) {
      // The key, given that the largest of them is the parent's (Kool et al. 2019, appendix B.3).
      const double v = parent - child.key + std::log1p(-std::exp(child.key - largest));
      child.key = parent - std::max(0.0, v) - std::log1p(std::exp(-std::fabs(v)));
      if (child.score > kNever && child.key > kNever) found_.push_back(child);
    }
  }

  void write(int64_t request, int64_t kept) {
    for (int64_t j = 0; j < k_; ++j) {
      const int64_t at = request * k_ + j;
      const Candidate none{kNever, kNever, 0, -1, {0, 0}};
      const Candidate& child = j < kept ? found_[j] : none;
      out_.keys[at] = child.key;
      out_.step.scores[at] = static_cast<float>(child.score);
      out_.step.parents[at] = child.beam;
      out_.step.tokens[at] = child.code;
      out_.step.states[2 * at] = child.rows.low;
      out_.step.states[2 * at + 1] = child.rows.high;
    }
  }

  const BeamSampleInput& in_;
  const Trie& trie_;
  const BeamSampleOutput& out_;
  const int64_t k_;
  Limits limits_;
  std::vector<Candidate> children_, found_;
};

}  // namespace

void trie_beam_sample(const BeamSampleInput& input, const Trie& trie, const TrieFilter& filter,
                      int64_t k, const BeamSampleOutput& output, int threads) {
  const BeamStepInput& step = input.step;
  const int64_t wanted =
      std::min(step.batch, step.batch * step.beams * step.width / kLogitsPerThread);
  const int workers = static_cast<int>(std::clamp<int64_t>(wanted, 1, threads));
  parallel(workers, [&](int worker) {
    Sample sample(input, trie, filter, k, output);
    const int64_t end = step.batch * (worker + 1) / workers;
    for (int64_t b = step.batch * worker / workers; b < end; ++b) sample.run(b);
  });
}

}  // namespace plum::cpu
