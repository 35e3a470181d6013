#include "plum/cpu_features.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace plum::cpu {
namespace {

constexpr const char* kNames[kNumIsas] = {"generic", "avx2", "avx512"};

bool supported(Isa isa) {
#ifdef PLUM_X86
  switch (isa) {
    case Isa::kGeneric:
      return true;
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  return false;
#else
  return isa == Isa::kGeneric;
#endif
}

Isa by_name(const std::string& name) {
  std::string available;
  for (int i = 0; i < kNumIsas; ++i) {
    if (!supported(static_cast<Isa>(i))) continue;
    if (name == kNames[i]) return static_cast<Isa>(i);
    available += available.empty() ? kNames[i] : std::string(", ") + kNames[i];
  }
  throw std::invalid_argument("CPU instruction set: expected one of " + available + ", got '" +
                              name + "'");
}

Isa initial() {
  if (const char* name = std::getenv("PLUM_CPU_ISA")) return by_name(name);
  for (int i = kNumIsas - 1; i > 0; --i) {
    if (supported(static_cast<Isa>(i))) return static_cast<Isa>(i);
  }
  return Isa::kGeneric;
}

// A function-local static, so that a bad PLUM_CPU_ISA throws at first use and not at load.
std::atomic<Isa>& active() {
  static std::atomic<Isa> isa{initial()};
  return isa;
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (int i = 0; i < kNumIsas; ++i) {
    if (supported(static_cast<Isa>(i))) names.emplace_back(kNames[i]);
  }
  return names;
}

Isa active_isa() { return active().load(std::memory_order_relaxed); }

std::string active_isa_name() { return kNames[static_cast<int>(active_isa())]; }

void set_isa(const std::string& name) { active().store(by_name(name)); }

}  // namespace plum::cpu
