// The body of residual_quantize, compiled once per instruction set inside the namespace PLUM_ISA,
// without contraction of products and sums. The variant defines kLanes, kGroup, kScreen (the
// Element that it multiplies), store_operand(), screen() and struct ScreenState before it.
//
// With t = r - mean and c' = c - mean, the nearest codeword has the largest score
// t.c' - |c'|^2/2. The screen computes scores with a bounded error and keeps, per lane (the
// codewords of one position in their panels), the best and the second best. Codewords that the
// bound cannot tell from the best are compared by fp32 distance, and those still close in fp64.
// An int8 screen is coarse, so it computes upper bounds: what each codeword's score can be at most.
// The fp32 distance of the codeword with the highest bound says which others are out.

constexpr bool kIntegers = kScreen == Element::kInt16 || kScreen == Element::kInt8;
constexpr bool kBounds = kScreen == Element::kInt8;
// Dimensions that share an element.
constexpr int kPack = kScreen == Element::kInt8 ? 4 : kScreen == Element::kFp32 ? 1 : 2;
// Below this (|t| + |c'|)^2, scores and distances cannot overflow.
constexpr double kHuge = 0x1p120;
// What D products lose at most when denormals are flushed, and a norm of D values when their
// squares are.
constexpr double kFlushedProduct = 0x1p-124, kFlushedValue = 0x1p-62;
// With more candidates than this, all codewords are compared.
constexpr int kMaxCandidates = 512;

// Dimensions between two reductions to fp64.
constexpr int64_t kChain = 1024;
// Rows that are centered before they are rounded: few enough to stay in the first-level cache, and
// enough that no row waits for the sums of the one before.
constexpr int64_t kTogether = 8;

// Sums of (r - c)^2 for kAtOnce codewords, which share the loads of r.
template <int kAtOnce>
void squared_distances(const float* r, const float* const* c, int64_t stride, double* distances) {
  double total[kAtOnce] = {};
  for (int64_t begin = 0; begin < stride; begin += kChain) {
    const int64_t end = smaller_of(begin + kChain, stride);
    Vec even[kAtOnce], odd[kAtOnce];
    for (int j = 0; j < kAtOnce; ++j) even[j] = odd[j] = broadcast(0);
    for (int64_t d = begin; d < end; d += 2 * kWidth) {
      const Vec a = load(r + d), b = load(r + d + kWidth);
      for (int j = 0; j < kAtOnce; ++j) {
        const Vec x = a - load(c[j] + d), y = b - load(c[j] + d + kWidth);
        even[j] = fma(x, x, even[j]);
        odd[j] = fma(y, y, odd[j]);
      }
    }
    for (int j = 0; j < kAtOnce; ++j) total[j] += sum(even[j] + odd[j]);
  }
  for (int j = 0; j < kAtOnce; ++j) distances[j] = total[j];
}

// The relative error of such a sum: 3 roundings of a term, one of each addition in a chain, at
// most 9 of adding up the chains, and one of keeping the sum as a float.
inline double distance_error(int64_t stride) {
  return (smaller_of(stride, kChain) / (2 * kWidth) + 16) * 0x1p-24;
}

// The same of one codeword in fp64, in eight chains: relative error below (stride + 32) / 2^52.
void squared_distance64(const float* r, const float* const* c, int64_t stride, double* distance) {
  double chains[8] = {};
  for (int64_t d = 0; d < stride; d += 8) {
    for (int j = 0; j < 8; ++j) {
      const double difference = double(r[d + j]) - double(c[0][d + j]);
      chains[j] += difference * difference;
    }
  }
  *distance = 0;
  for (double chain : chains) *distance += chain;
}

// r -= c; returns |r|^2.
double subtract(float* r, const float* c, int64_t stride) {
  double total = 0;
  for (int64_t begin = 0; begin < stride; begin += kChain) {
    const int64_t end = smaller_of(begin + kChain, stride);
    Vec even = broadcast(0), odd = broadcast(0);
    for (int64_t d = begin; d < end; d += 2 * kWidth) {
      const Vec x = load(r + d) - load(c + d), y = load(r + d + kWidth) - load(c + d + kWidth);
      store(r + d, x);
      store(r + d + kWidth, y);
      even = fma(x, x, even);
      odd = fma(y, y, odd);
    }
    total += sum(even + odd);
  }
  return total;
}

bool finite(const float* r, int64_t stride) {
  Vec zero = broadcast(0);
  for (int64_t d = 0; d < stride; d += kWidth) zero = fma(load(r + d), broadcast(0), zero);
  return sum(zero) == 0;
}

void widen(const Problem& p, int64_t row, float* r) {
  const int64_t first = row * p.width;
  const uint16_t* half = static_cast<const uint16_t*>(p.x) + first;
  if (p.type == 0) {
    __builtin_memcpy(r, static_cast<const float*>(p.x) + first, p.width * sizeof(float));
  } else if (p.type == 1) {
    for (int64_t d = 0; d < p.width; ++d) r[d] = from_bits(uint32_t{half[d]} << 16);
  } else {
    for (int64_t d = 0; d < p.width; ++d) r[d] = from_half(half[d]);
  }
  __builtin_memset(r + p.width, 0, (p.stride - p.width) * sizeof(float));
}

// What rounding a sum of squares up or down makes of its root, and flushing denormals.
inline double inflated(int64_t stride) { return 1 + (stride + 32) * 0x1p-23; }
inline double flushed(int64_t stride) { return __builtin_sqrt(double(stride)) * kFlushedValue; }

// The most that rounding t to the operand moved it, by the sum of squares of what is left. The
// subtraction of the mean rounds once.
inline double error_of(const Row& row, double left, int64_t stride) {
  return __builtin_sqrt(left * inflated(stride)) + flushed(stride) + row.norm * 0x1p-23;
}

// Takes r -= c if kSubtract, measures t = r - mean and returns |r|^2. Writes t as the level's
// screen wants it, unless that is as integers: those need the norm first.
template <bool kSubtract>
double center(float* r, const float* c, const Level& level, int64_t stride, float* operand,
              Row& row) {
  Vec norms[2] = {broadcast(0), broadcast(0)}, errors[2] = {broadcast(0), broadcast(0)};
  Vec highest = broadcast(0), lowest = broadcast(0);
  double total = 0;
  for (int64_t begin = 0; begin < stride; begin += kChain) {
    const int64_t end = smaller_of(begin + kChain, stride);
    Vec squares[2] = {broadcast(0), broadcast(0)};
    for (int64_t d = begin; d < end; d += 2 * kWidth) {
      Vec t[2];
      for (int j = 0; j < 2; ++j) {
        const int64_t at = d + j * kWidth;
        Vec x = load(r + at);
        if (kSubtract) {
          x = x - load(c + at);
          store(r + at, x);
          squares[j] = fma(x, x, squares[j]);
        }
        t[j] = x - load(level.mean + at);
        norms[j] = fma(t[j], t[j], norms[j]);
        if (kBounds) {
          highest = larger(highest, t[j]);
          lowest = smaller(lowest, t[j]);
        }
      }
      if (!kIntegers) {
        store_operand(t[0], t[1], 1, operand + d / kPack);
        for (int j = 0; j < 2; ++j) errors[j] = fma(t[j], t[j], errors[j]);
      }
    }
    if (kSubtract) total += sum(squares[0] + squares[1]);
  }
  const double square = sum(norms[0] + norms[1]);
  row.norm = __builtin_sqrt(square * inflated(stride)) + flushed(stride);
  if (!kIntegers) row.error = error_of(row, sum(errors[0] + errors[1]), stride);
  if (kBounds) {
    const float most = largest(larger(highest, broadcast(0) - lowest));
    row.step = most > 0x1p-70f ? most * (1 / 127.0f) : 0x1p-77f;
    row.square = square * (2 - inflated(stride) - 0x1p-22) - stride * kFlushedProduct;
  } else if (kIntegers) {
    row.step = static_cast<float>(row.norm * (1 / residual::kRowSteps));
  }
  return total;
}

// Writes t = r - mean as numbers of steps.
void round_row(const float* r, const Level& level, int64_t stride, float* operand, Row& row) {
  Vec errors[2] = {broadcast(0), broadcast(0)};
  for (int64_t d = 0; d < stride; d += 2 * kWidth) {
    Vec t[2];
    for (int j = 0; j < 2; ++j) {
      t[j] = load(r + d + j * kWidth) - load(level.mean + d + j * kWidth);
    }
    store_operand(t[0], t[1], row.step, operand + d / kPack);
    for (int j = 0; j < 2; ++j) errors[j] = fma(t[j], t[j], errors[j]);
  }
  row.error = error_of(row, sum(errors[0] + errors[1]), stride);
  if (kBounds) {
    row.bounds[0] = static_cast<float>(row.norm * 1.000001);
    row.bounds[1] = static_cast<float>(row.error * 1.000001);
  }
}

// The nearest of `count` codewords as the contract defines it: the lowest of equal distances.
// All codewords where `slots` is null.
int32_t nearest_exact(const Problem& p, const Level& level, const float* r, const int32_t* slots,
                      int64_t count) {
  // Sums in the order of the dimensions are chains of additions; several chains run at once.
  constexpr int kChains = 8;
  int32_t nearest = 0;
  double least = __builtin_inf();
  for (int64_t first = 0; first < count; first += kChains) {
    int32_t slot[kChains];
    const float* c[kChains];
    double distance[kChains] = {};
    for (int j = 0; j < kChains; ++j) {
      const int64_t i = smaller_of(first + j, count - 1);
      slot[j] = slots ? slots[i] : static_cast<int32_t>(i);
      c[j] = level.rows + slot[j] * p.stride;
    }
    for (int64_t d = 0; d < p.width; ++d) {
      for (int j = 0; j < kChains; ++j) {
        const double difference = double(r[d]) - double(c[j][d]);
        distance[j] += difference * difference;
      }
    }
    for (int j = 0; j < kChains; ++j) {
      if (distance[j] < least || (distance[j] == least && slot[j] < nearest)) {
        least = distance[j];
        nearest = slot[j];
      }
    }
  }
  return nearest;
}

// A codeword that was compared before.
struct Known {
  int32_t slot;
  float distance;
};

// Keeps in `close` those of `count` codewords and the known one, if any, that may be nearest by
// distances of bounded relative error, at most kMaxCandidates; returns how many, or -1 if they are
// more. `close` may be `slots` where none is known.
template <int kAtOnce, typename Distances>
int narrow(const Problem& p, const Level& level, const float* r, const int32_t* slots,
           int64_t count, Distances distances_of, double error, const Known* known,
           int32_t* close) {
  double distances[kMaxCandidates];
  int kept = 0;
  double limit = __builtin_inf(), least = limit;
  const auto limit_of = [&](double distance) {
    return distance * (1 + 4 * error) + p.stride * kFlushedProduct;
  };
  if (known) {
    close[kept] = known->slot;
    distances[kept++] = least = known->distance;
    limit = limit_of(least);
  }
  for (int64_t first = 0; first < count; first += kAtOnce) {
    int32_t slot[kAtOnce];
    const float* c[kAtOnce];
    double found[kAtOnce];
    for (int j = 0; j < kAtOnce; ++j) {
      const int64_t i = smaller_of(first + j, count - 1);
      slot[j] = slots ? slots[i] : static_cast<int32_t>(i);
      c[j] = level.rows + slot[j] * p.stride;
    }
    distances_of(r, c, p.stride, found);
    for (int j = 0; j < kAtOnce; ++j) {
      if (found[j] > limit || first + j >= count) continue;
      if (found[j] < least) {
        least = found[j];
        limit = limit_of(least);
        const int before = kept;
        kept = 0;
        for (int k = 0; k < before; ++k) {
          if (distances[k] > limit) continue;
          close[kept] = close[k];
          distances[kept++] = distances[k];
        }
      }
      if (kept == kMaxCandidates) return -1;
      close[kept] = slot[j];
      distances[kept++] = found[j];
    }
  }
  return kept;
}

// As nearest_exact, which decides only between those that other distances cannot tell apart.
int32_t nearest_of(const Problem& p, const Level& level, const float* r, const int32_t* slots,
                   int64_t count, const Known* known) {
  int32_t close[kMaxCandidates];
  int kept = narrow<2>(p, level, r, slots, count, squared_distances<2>, distance_error(p.stride),
                       known, close);
  if (kept < 0) {
    // There may be room for all slots, but not for the known one too.
    return known ? nearest_exact(p, level, r, nullptr, level.count)
                 : nearest_exact(p, level, r, slots, count);
  }
  if (kept == 1) return close[0];
  const double error = (p.stride + 32) * 0x1p-52;
  kept = narrow<1>(p, level, r, close, kept, squared_distance64, error, nullptr, close);
  return kept == 1 ? close[0] : nearest_exact(p, level, r, close, kept);
}

// Scores within this of the best may be those of the nearest codeword; of bounds, those within this
// of its score. `top` is the size of the largest of them.
inline double margin(const Problem& p, const Level& level, const Row& row, double top) {
  // Cauchy-Schwarz on the rounding of the operands, then D additions and the bias, each with two
  // roundings, then the tag, which moves a score of the size of the best. Rounded fp64 distances,
  // which are what counts, may tie where scores do not.
  double operands = row.error * (level.norm + level.error) + (row.norm + row.error) * level.error;
  // Bounds contain that already, but for their own rounding.
  if (kBounds) operands *= 0x1p-20;
  const double additions =
      (p.stride + 8) * 0x1p-23 * (row.norm + level.norm) * level.norm + p.stride * kFlushedProduct;
  const double error = 1.001 * (operands + additions);
  const double tag = (level.tag_mask + 2.0) * 0x1p-23 * (top + 2 * error);
  const double norms = row.norm + level.norm;
  return 2.001 * (error + tag) + (p.stride + 32) * 0x1p-52 * norms * norms;
}

// Bit i: the score of lane i is at least `threshold`.
inline uint64_t lanes_above(const float* scores, float threshold) {
  uint64_t lanes = 0;
  for (int v = 0; v < kLanes; v += kWidth) {
    lanes |= uint64_t{at_least(load(scores + v), threshold)} << v;
  }
  return lanes;
}

inline int32_t slot_of(const Level& level, const float* best, int lane) {
  return static_cast<int32_t>(to_bits(best[lane]) & level.tag_mask) * kLanes + lane;
}

// The nearest codeword of r among those whose best or second best scores are above `threshold`.
// Adds how many those are to `compared`.
int32_t nearest_above(const Problem& p, const Level& level, const float* r, const float* best,
                      const float* second, float threshold, const Known* known, int64_t& compared) {
  const uint64_t crowded = lanes_above(second, threshold);
  int32_t candidates[kMaxCandidates];
  int count = 0;
  for (uint64_t lanes = lanes_above(best, threshold); lanes != 0; lanes &= lanes - 1) {
    const int lane = __builtin_ctzll(lanes);
    const bool whole_lane = crowded >> lane & 1;
    int64_t slot = whole_lane ? lane : slot_of(level, best, lane);
    for (; slot < level.count; slot += kLanes) {
      if (count == kMaxCandidates) {
        compared += level.count;
        return nearest_of(p, level, r, nullptr, level.count, nullptr);
      }
      candidates[count] = static_cast<int32_t>(slot);
      count += !known || slot != known->slot;
      if (!whole_lane) break;
    }
  }
  compared += count;
  return nearest_of(p, level, r, candidates, count, known);
}

// A lower bound of the score of a codeword, by its distance.
inline double score_at_least(const Problem& p, const Row& row, double distance) {
  distance = distance * (1 + 2 * distance_error(p.stride)) + p.stride * kFlushedProduct;
  return (row.square - distance) / 2;
}

// Finds the nearest codewords of `count` rows, given the best and second best tagged scores of each
// lane. Rows with one candidate go straight through; the others come after them. Returns how many
// codewords were compared by distance.
//   work  [3, count]
int64_t find_nearest(const Problem& p, const Level& level, const float* residual, int64_t count,
                     const Row* rows, const float* best, const float* second, float* work,
                     int32_t* slots) {
  float* thresholds = work;
  float* distances = work + count;
  int32_t* unsure = reinterpret_cast<int32_t*>(work + 2 * count);
  int64_t compared = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float* scores = best + i * kLanes;
    Vec highest = load(scores);
    for (int v = kWidth; v < kLanes; v += kWidth) highest = larger(highest, load(scores + v));
    thresholds[i] = largest(highest);
    if (!kBounds) continue;
    const uint64_t lanes = lanes_above(scores, thresholds[i]);
    const int32_t slot = slot_of(level, scores, lanes == 0 ? 0 : __builtin_ctzll(lanes));
    // Scores that are no numbers say nothing.
    slots[i] = slot < level.count ? slot : 0;
  }
  for (int64_t i = 0; i < count; ++i) {
    const double top = thresholds[i];
    double least = top;
    if (kBounds) {
      const float* c = level.rows + slots[i] * p.stride;
      double distance;
      squared_distances<1>(residual + i * p.stride, &c, p.stride, &distance);
      distances[i] = static_cast<float>(distance);
      least = score_at_least(p, rows[i], distances[i]);
      ++compared;
    }
    const double size = __builtin_fmax(__builtin_fabs(top), __builtin_fabs(least));
    thresholds[i] = static_cast<float>(least - margin(p, level, rows[i], size));
  }
  int64_t left = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t lanes = lanes_above(best + i * kLanes, thresholds[i]);
    const uint64_t crowded = lanes_above(second + i * kLanes, thresholds[i]);
    const double norms = rows[i].norm + level.norm;
    const bool sure =
        (lanes & (lanes - 1)) == 0 && lanes != 0 && crowded == 0 && norms * norms < kHuge;
    if (!kBounds) {
      slots[i] = slot_of(level, best + i * kLanes, lanes == 0 ? 0 : __builtin_ctzll(lanes));
    }
    unsure[left] = static_cast<int32_t>(i);
    left += !sure;
  }
  for (int64_t j = 0; j < left; ++j) {
    const int64_t i = unsure[j];
    const float* r = residual + i * p.stride;
    const double norms = rows[i].norm + level.norm;
    if (norms * norms < kHuge) {
      const Known top = {slots[i], kBounds ? distances[i] : 0};
      slots[i] = nearest_above(p, level, r, best + i * kLanes, second + i * kLanes, thresholds[i],
                               kBounds ? &top : nullptr, compared);
    } else {
      slots[i] = nearest_exact(p, level, r, nullptr, level.count);
    }
  }
  return compared;
}

// Fetches the part of row `row` that falls to level l, so that memory works all the time.
void fetch(const Problem& p, int64_t row, int64_t l) {
  constexpr int64_t kLine = 64;
  const int64_t bytes = p.width * (p.type == 0 ? sizeof(float) : sizeof(uint16_t));
  const char* first = static_cast<const char*>(p.x) + row * bytes;
  for (int64_t at = bytes * l / p.num_levels; at < bytes * (l + 1) / p.num_levels; at += kLine) {
    __builtin_prefetch(first + at, 0, 2);
  }
}

// Finds the codes of rows [begin, begin + count); returns the first that is not finite, or -1. Adds
// to `compared` how many codewords the screens left to be compared.
//   next       where the rows of the block after this one begin
//   workspace  aligned to 64 bytes
int64_t quantize_block(const Problem& p, int64_t begin, int64_t count, int64_t next,
                       float* workspace, int64_t* compared) {
  const int64_t padded = (count + kRowUnit - 1) / kRowUnit * kRowUnit;
  const int64_t elements = p.stride / kPack;
  float* residual = workspace;
  float* operand = residual + padded * p.stride;
  float* best = operand + padded * elements;
  float* second = best + padded * kLanes;
  Row* norms = reinterpret_cast<Row*>(second + padded * kLanes);
  float* work = reinterpret_cast<float*>(norms + padded);
  int32_t* slots = reinterpret_cast<int32_t*>(work + 3 * padded);
  [[maybe_unused]] const ScreenState state;
  int64_t bad = -1;
  // A row that is not finite is noted, and goes on as zeros.
  const auto replace = [&](int64_t i, const Level& level) {
    if (bad < 0 || begin + i < bad) bad = begin + i;
    float* r = residual + i * p.stride;
    __builtin_memset(r, 0, p.stride * sizeof(float));
    center<false>(r, nullptr, level, p.stride, operand + i * elements, norms[i]);
  };
  const auto round_rows = [&](int64_t from, int64_t until, const Level& level) {
    for (int64_t i = from; kIntegers && i < until; ++i) {
      round_row(residual + i * p.stride, level, p.stride, operand + i * elements, norms[i]);
    }
  };
  for (int64_t from = 0; from < count; from += kTogether) {
    const int64_t until = smaller_of(from + kTogether, count);
    for (int64_t i = from; i < until; ++i) {
      float* r = residual + i * p.stride;
      widen(p, begin + i, r);
      center<false>(r, nullptr, p.levels[0], p.stride, operand + i * elements, norms[i]);
      if (!(norms[i].norm < __builtin_inf()) && !finite(r, p.stride)) replace(i, p.levels[0]);
    }
    round_rows(from, until, p.levels[0]);
  }
  __builtin_memset(operand + count * elements, 0, (padded - count) * elements * sizeof(float));
  for (int64_t i = count; i < padded; ++i) norms[i] = {};
  for (int64_t l = 0; l < p.num_levels; ++l) {
    const Level& level = p.levels[l];
    const bool last_level = l + 1 == p.num_levels;
    const Level& next_level = p.levels[last_level ? l : l + 1];
    const int64_t panels = (level.count + kLanes - 1) / kLanes;
    const int64_t together = residual::kPanelBytes / (elements * kLanes * sizeof(float)) + 1;
    for (int64_t first = 0; first < panels; first += together) {
      const int64_t last = smaller_of(first + together, panels);
      for (int64_t i = 0; i < count; i += kGroup) {
        screen(operand + i * elements, norms + i, elements, level, first, last, best + i * kLanes,
               second + i * kLanes);
      }
    }
    *compared += find_nearest(p, level, residual, count, norms, best, second, work, slots);
    for (int64_t from = 0; from < count; from += kTogether) {
      const int64_t until = smaller_of(from + kTogether, count);
      for (int64_t i = from; i < until; ++i) {
        float* r = residual + i * p.stride;
        fetch(p, next + i, l);
        const int32_t slot = slots[i];
        const float* c = level.rows + slot * p.stride;
        const double norm =
            last_level ? subtract(r, c, p.stride)
                       : center<true>(r, c, next_level, p.stride, operand + i * elements, norms[i]);
        const int64_t out = (begin + i) * p.num_levels + l;
        p.codes[out] = level.code[slot];
        p.norms[out] = static_cast<float>(norm);
        // A finite norm has finite terms.
        if (!(norm < 0x1p127) && !finite(r, p.stride)) replace(i, next_level);
      }
      if (!last_level) round_rows(from, until, next_level);
    }
  }
  if (p.residual) {
    for (int64_t i = 0; i < count; ++i) {
      __builtin_memcpy(p.residual + (begin + i) * p.width, residual + i * p.stride,
                       p.width * sizeof(float));
    }
  }
  return bad;
}
