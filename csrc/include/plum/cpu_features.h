// Which instruction sets this CPU has and which one the kernels use.
#pragma once

#include <string>
#include <vector>

namespace plum::cpu {

// Each can do what those before it can.
enum class Isa : int { kGeneric, kAvx2, kAvx512, kAvx512Vnni, kAvx512Bf16, kAmxBf16 };
constexpr int kNumIsas = 6;

// Instruction sets that this CPU can run and this build contains, narrowest first.
std::vector<std::string> available_isas();

// The fastest available one, unless PLUM_CPU_ISA or set_isa says otherwise.
// Throws std::invalid_argument when PLUM_CPU_ISA names one that is not available.
Isa active_isa();
std::string active_isa_name();

// Throws std::invalid_argument when `name` is not available.
void set_isa(const std::string& name);

}  // namespace plum::cpu
