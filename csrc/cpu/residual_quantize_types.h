// What residual_quantize.cpp and the kernel variants exchange: plain data, nothing inline.
#pragma once

#include <cstdint>

namespace plum::cpu::residual {

// What a screen multiplies.
enum class Element { kFp32, kBf16, kInt16, kInt8 };

// Rows of a block and dimensions are padded with zeros to multiples of these.
constexpr int64_t kRowUnit = 96;
constexpr int64_t kStrideUnit = 32;
constexpr int64_t kMaxLanes = 64;
// Norms of int16 rows and codewords. By Cauchy-Schwarz no part of a product of theirs leaves int32,
// also when each of up to 2^21 dimensions is rounded by half a step, which adds 724 to a norm.
constexpr double kRowSteps = 32000, kCodewordSteps = 64000;
// Bytes of panels that stay in the second-level cache beside a block of rows.
constexpr int64_t kPanelBytes = int64_t{1} << 18;

// Below every score, and finite when its low bits hold a panel.
constexpr float kNone = -3e38f;

// int8 rows are stored with this added: the instruction multiplies unsigned by signed bytes.
constexpr int32_t kByteOffset = 128;

// A screen multiplies 4-byte elements: one fp32 dimension, two bf16 or int16 dimensions, or four
// int8 dimensions each.
struct Level {
  int64_t count;         // distinct codewords
  const float* rows;     // [count, stride]
  const int32_t* code;   // [count]
  const float* mean;     // [stride]
  const float* panels;   // [panels, elements, lanes] of c' = c - mean
  const float* bias;     // [panels, lanes] -|c'|^2 / 2
  const int32_t* start;  // int8: [panels, lanes] what sums start from, for the offset of rows
  const float* steps;    // int8: [panels, lanes] of the integers of each codeword
  const float* norms;    // int8: [panels, lanes] upper bounds of |what the screen multiplies|
  const float* errors;   // int8: [panels, lanes] upper bounds of |c' - what the screen multiplies|
  int32_t tag_mask;      // the low bits of a score that hold its panel
  float step;            // int16: of the integers of all codewords
  double norm;           // max |c'|
  double error;          // max |c' - what the screen multiplies|
};

struct Row {
  double norm, error;  // upper bounds of |t| and |t - what the screen multiplies|
  double square;       // int8: a lower bound of |t|^2
  float step;          // of the integers that are multiplied
  float bounds[2];     // int8: norm and error, rounded up
};

struct Problem {
  const void* x;
  int type;  // RowType
  int64_t width, stride;
  const Level* levels;
  int64_t num_levels;
  int32_t* codes;
  float* norms;
  float* residual;
};

}  // namespace plum::cpu::residual
