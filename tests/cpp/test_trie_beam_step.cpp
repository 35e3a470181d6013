// Each step against a list of all children, sorted, and the bits of every instruction set; each
// sample against the same list.
#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "plum/cpu_features.h"
#include "plum/trie_beam_sample.h"
#include "plum/trie_beam_step.h"
#include "plum/trie_deny.h"
#include "trie_table.h"

namespace {

using plum::cpu::RowType;

constexpr double kNever = -std::numeric_limits<double>::infinity();

struct Result {
  std::vector<int64_t> tokens, parents, states;
  std::vector<float> scores;
  bool operator==(const Result& other) const {
    return tokens == other.tokens && parents == other.parents && states == other.states &&
           scores == other.scores;
  }
};

struct Case {
  std::vector<float> logits, scores;
  std::vector<uint16_t> bf16, fp16;
  std::vector<int64_t> states, deny, dead, columns, levels;
  std::vector<bool> kept;
  std::vector<uint64_t> bits, masks;
  std::vector<uint32_t> ranks;
  plum::TrieFilter filter{nullptr, nullptr, {}};
  plum::cpu::BeamStepInput input{};
  int64_t level, offset, k;
};

// An eighth of an integer below 2^8 as fp16.
uint16_t to_half(float x) {
  if (x == 0) return 0;
  int exponent;
  const float mantissa = std::frexp(std::fabs(x), &exponent);
  const int bits = (exponent + 14) << 10 | static_cast<int>((2 * mantissa - 1) * 1024);
  return static_cast<uint16_t>(bits | (x < 0) << 15);
}

// Small logits whose values are the same in fp32, bf16 and fp16.
void make_case(const TrieTable& trie, std::mt19937_64& random, Case& c) {
  auto& in = c.input;
  const int64_t rows = trie.rows;
  in.batch = 1 + random() % 3;
  in.beams = 1 + random() % 20;
  c.offset = random() % 2 * 5;
  in.width = c.offset + trie.size + random() % 3;
  in.beam_stride = in.width + random() % 2;
  in.batch_stride = in.beams * in.beam_stride + random() % 2;
  in.valid = random() % 2;
  c.level = random() % trie.depth;
  c.k = 1 + random() % (random() % 2 ? 5 : 400);
  c.logits.resize(in.batch * in.batch_stride);
  for (float& x : c.logits) x = static_cast<float>(int64_t(random() % 65) - 32) / 8;
  for (float x : c.logits) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    c.bf16.push_back(static_cast<uint16_t>(bits >> 16));
    c.fp16.push_back(to_half(x));
  }
  for (int64_t i = 0; i < in.batch * in.beams; ++i) {
    c.scores.push_back(-static_cast<float>(random() % 100) / 10);
    // The range of a random row's prefix.
    auto prefix = trie.table[random() % rows];
    prefix.resize(c.level);
    const auto range = trie.range_of(prefix);
    const bool dead = random() % 10 == 0;
    c.states.insert(c.states.end(), {dead ? 0 : range[0], dead ? 0 : range[1]});
  }
  c.kept.assign(rows, true);
  if (random() % 2) {
    for (int64_t r = 0; r < rows; ++r) c.kept[r] = random() % 2;
    c.filter = trie.filter(c.kept, c.bits, c.ranks, c.masks);
  }
  if (random() % 2) {
    in.denied = random() % (rows + 3);
    for (int64_t d = 0; d < in.batch * in.denied; ++d) {
      c.deny.push_back(static_cast<int64_t>(random() % (rows + 2)) - 1);
    }
    if (random() % 2) std::sort(c.deny.begin(), c.deny.end());
  }
  in.scores = c.scores.data();
  in.states = c.states.data();
  c.columns.assign(trie.depth, c.offset);
  // A level of each request: that of all, or one that the trie has not.
  for (int64_t b = 0; b < in.batch; ++b) {
    c.levels.push_back(random() % 4 ? c.level : random() % 2 ? -1 : trie.depth);
  }
  if (random() % 2) c.levels.assign(in.batch, c.level);
  const bool same = c.levels == std::vector<int64_t>(in.batch, c.level);
  in.levels = {c.level, same && random() % 2 ? nullptr : c.levels.data()};
  if (in.denied > 0) {
    c.dead.assign(in.batch * trie.depth * in.denied, -7);
    const std::vector<int64_t> roots{0, rows};
    plum::cpu::trie_deny({c.deny.data(), in.batch, in.denied}, trie.trie, {roots.data(), 1},
                         c.filter, c.dead.data(), 2);
    in.dead = c.dead.data();
  }
}

Result run(const TrieTable& trie, Case& c, RowType type, int threads) {
  c.input.columns = c.columns.data();
  c.input.logits = type == RowType::kFloat32    ? static_cast<const void*>(c.logits.data())
                   : type == RowType::kBfloat16 ? c.bf16.data()
                                                : c.fp16.data();
  c.input.type = type;
  const int64_t places = c.input.batch * c.k;
  Result r{std::vector<int64_t>(places, -7), std::vector<int64_t>(places, -7),
           std::vector<int64_t>(2 * places, -7), std::vector<float>(places, -7)};
  plum::cpu::trie_beam_step(c.input, trie.trie, c.filter, c.k,
                            {r.tokens.data(), r.parents.data(), r.scores.data(), r.states.data()},
                            threads);
  return r;
}

struct Child {
  double score;
  int64_t beam, code, low, high;
};

// The legal children of a request, by beam and code, with their scores.
std::vector<Child> children_of(const TrieTable& trie, const Case& c, int64_t b, bool valid,
                               double temperature) {
  const auto& in = c.input;
  std::vector<Child> children;
  for (int64_t w = 0; w < in.beams && in.levels[b] == c.level; ++w) {
    const float* row = c.logits.data() + b * in.batch_stride + w * in.beam_stride;
    const int64_t* state = c.states.data() + 2 * (b * in.beams + w);
    const int64_t* list = c.deny.data() + b * in.denied;
    std::vector<Child> legal;
    for (int64_t low = state[0], high; low < state[1]; low = high) {
      const int64_t code = trie.table[low][c.level];
      bool left = false;
      for (high = low; high < state[1] && trie.table[high][c.level] == code; ++high) {
        left |= c.kept[high] && (in.denied == 0 || !std::count(list, list + in.denied, high));
      }
      if (left) legal.push_back({row[c.offset + code] / temperature, w, code, low, high});
    }
    double sum = 0;
    for (int64_t v = 0; !valid && v < in.width; ++v) sum += std::exp(double(row[v]));
    for (const Child& child : legal) sum += valid ? std::exp(child.score) : 0;
    for (Child child : legal) {
      child.score += in.scores[b * in.beams + w] - std::log(sum);
      children.push_back(child);
    }
  }
  return children;
}

void check(const TrieTable& trie, const Case& c, const Result& r) {
  const auto& in = c.input;
  for (int64_t b = 0; b < in.batch; ++b) {
    const std::vector<Child> children = children_of(trie, c, b, in.valid, 1);
    const auto found = std::min<int64_t>(c.k, children.size());
    std::vector<double> scores;
    for (const Child& child : children) scores.push_back(child.score);
    std::sort(scores.begin(), scores.end(), std::greater<>());
    for (int64_t j = 0; j < c.k; ++j) {
      const int64_t at = b * c.k + j;
      if (j >= found) {
        CHECK(r.tokens[at] == -1 && r.parents[at] == 0 && r.scores[at] == kNever);
        CHECK(r.states[2 * at] == 0 && r.states[2 * at + 1] == 0);
        continue;
      }
      // Scores lie within 2e-5: a few fp32 roundings of numbers below 32.
      CHECK(std::fabs(r.scores[at] - scores[j]) < 2e-5);
      const auto child = std::find_if(children.begin(), children.end(), [&](const Child& each) {
        return each.beam == r.parents[at] && each.low == r.states[2 * at];
      });
      CHECK(child != children.end() && std::fabs(child->score - r.scores[at]) < 2e-5);
      CHECK(r.tokens[at] == child->code);
      CHECK(r.states[2 * at + 1] == child->high);
      if (j == 0 || r.scores[at] < r.scores[at - 1]) continue;
      CHECK(r.scores[at] == r.scores[at - 1]);
      CHECK(r.parents[at - 1] < r.parents[at] ||
            (r.parents[at - 1] == r.parents[at] && r.tokens[at - 1] < r.tokens[at]));
    }
  }
}

// Draws all the children there are room for: each once, by falling keys, the largest key of a
// beam's children being the beam's, and on any number of threads.
void check_sample(const TrieTable& trie, Case& c, std::mt19937_64& random) {
  const auto& in = c.input;
  std::vector<double> keys;
  for (int64_t i = 0; i < in.batch * in.beams; ++i) keys.push_back(-double(random() % 1000) / 100);
  std::vector<int64_t> seeds;
  for (int64_t b = 0; b < in.batch; ++b) seeds.push_back(static_cast<int64_t>(random()));
  const double temperature = 0.5 + random() % 3;
  const int64_t places = in.batch * c.k;
  Result results[2];
  std::vector<double> drawn[2];
  for (int i : {0, 1}) {
    Result& r = results[i];
    drawn[i].assign(places, -7);
    r = {std::vector<int64_t>(places, -7), std::vector<int64_t>(places, -7),
         std::vector<int64_t>(2 * places, -7), std::vector<float>(places, -7)};
    const plum::cpu::BeamStepOutput out{r.tokens.data(), r.parents.data(), r.scores.data(),
                                        r.states.data()};
    plum::cpu::trie_beam_sample({in, keys.data(), seeds.data(), temperature}, trie.trie, c.filter,
                                c.k, {out, drawn[i].data()}, 1 + 2 * i);
  }
  CHECK(results[0] == results[1] && drawn[0] == drawn[1]);
  const Result& r = results[0];
  for (int64_t b = 0; b < in.batch; ++b) {
    std::vector<Child> children = children_of(trie, c, b, true, temperature);
    const auto found = std::min<int64_t>(c.k, children.size());
    const bool all = found == static_cast<int64_t>(children.size());
    std::vector<double> largest(in.beams, kNever);
    for (int64_t j = 0; j < c.k; ++j) {
      const int64_t at = b * c.k + j;
      const double key = drawn[0][at];
      if (j >= found) {
        CHECK(key == kNever && r.tokens[at] == -1 && r.scores[at] == kNever);
        continue;
      }
      CHECK(j == 0 || key <= drawn[0][at - 1]);
      const auto child = std::find_if(children.begin(), children.end(), [&](const Child& each) {
        return each.beam == r.parents[at] && each.low == r.states[2 * at];
      });
      CHECK(child != children.end() && std::fabs(child->score - r.scores[at]) < 2e-5);
      CHECK(r.tokens[at] == child->code && r.states[2 * at + 1] == child->high);
      largest[child->beam] = std::max(largest[child->beam], key);
      children.erase(child);
    }
    for (int64_t w = 0; all && w < in.beams; ++w) {
      CHECK(largest[w] == kNever || std::fabs(largest[w] - keys[b * in.beams + w]) < 1e-9);
    }
  }
}

// Rows of any value for states, and logits that are no numbers: what comes is of the beams, in
// order, and the same by every instruction set.
void check_any_states(const TrieTable& trie, Case& c, std::mt19937_64& random) {
  const int64_t end = trie.rows + 2;
  for (int64_t& row : c.states) row = random() % 9 ? random() % end : random();
  for (float& x : c.logits) x = random() % 50 ? x : std::numeric_limits<float>::quiet_NaN();
  Result first;
  for (const std::string& isa : plum::cpu::available_isas()) {
    plum::cpu::set_isa(isa);
    const Result result = run(trie, c, RowType::kFloat32, 1);
    if (first.tokens.empty()) first = result;
    CHECK(result == first);
  }
  for (size_t at = 0; at < first.tokens.size(); ++at) {
    CHECK(first.parents[at] >= 0 && first.parents[at] < c.input.beams);
    CHECK(first.tokens[at] >= -1 && first.tokens[at] < trie.size);
    CHECK(at % c.k == 0 || !(first.scores[at] > first.scores[at - 1]));
  }
}

}  // namespace

int main() {
  std::mt19937_64 random(1);
  for (int round = 0; round < 400; ++round) {
    const int64_t size = std::vector<int64_t>{1, 2, 17, 90, 1100}[random() % 5];
    const TrieTable trie(1 + random() % 300, 1 + random() % 4, size, random);
    Case c;
    make_case(trie, random, c);
    Result first;
    for (const std::string& isa : plum::cpu::available_isas()) {
      plum::cpu::set_isa(isa);
      for (RowType type : {RowType::kFloat32, RowType::kBfloat16, RowType::kFloat16}) {
        const Result result = run(trie, c, type, 1 + round % 3);
        if (first.tokens.empty()) first = result;
        CHECK(result == first);
      }
    }
    check(trie, c, first);
    check_sample(trie, c, random);
    for (int i = 0; i < 5; ++i) check_any_states(trie, c, random);
  }
  std::puts("test_trie_beam_step: ok");
}
