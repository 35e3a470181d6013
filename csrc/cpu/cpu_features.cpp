#include "plum/cpu_features.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#ifdef PLUM_X86
#include <cpuid.h>
#endif

#if defined(PLUM_BF16) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace plum::cpu {
namespace {

constexpr const char* kNames[kNumIsas] = {"generic",     "avx2",        "avx512",
                                          "avx512_vnni", "avx512_bf16", "amx_bf16"};

#ifdef PLUM_X86
// What __builtin_cpu_supports does not know in every compiler: F16C of GCC 10 and clang 17, AMX of
// clang 16.
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx >> 29 & 1) != 0;
}
#endif

#ifdef PLUM_BF16
bool has_amx_bf16() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx >> 22 & 1) != 0;
}

// Tiles hold 8 KiB of state, which Linux saves only for processes that ask for it.
bool tiles_permitted() {
#ifdef __linux__
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  static const bool permitted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return permitted;
#else
  return false;
#endif
}
#endif

bool supported(Isa isa) {
#ifdef PLUM_X86
  switch (isa) {
    case Isa::kGeneric:
      return true;
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    case Isa::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    case Isa::kAvx512Vnni:
      return supported(Isa::kAvx512) && __builtin_cpu_supports("avx512vnni");
#ifdef PLUM_BF16
    case Isa::kAvx512Bf16:
      return supported(Isa::kAvx512Vnni) && __builtin_cpu_supports("avx512bf16");
    case Isa::kAmxBf16:
      return supported(Isa::kAvx512Bf16) && has_amx_bf16() && tiles_permitted();
#endif
    default:
      break;
  }
  return false;
#else
  return isa == Isa::kGeneric;
#endif
}

Isa by_name(const std::string& name, const char* what) {
  std::string available;
  for (int i = 0; i < kNumIsas; ++i) {
    if (!supported(static_cast<Isa>(i))) continue;
    if (name == kNames[i]) return static_cast<Isa>(i);
    available += available.empty() ? kNames[i] : std::string(", ") + kNames[i];
  }
  throw std::invalid_argument(std::string(what) + ": expected one of " + available + ", got '" +
                              name + "'");
}

// Intel's cores start a 512-bit bf16 dot product every other cycle, and two fp32 FMAs or int16 dot
// products every cycle, so there bf16 pays only in tiles.
bool worthwhile(Isa isa) {
#ifdef PLUM_X86
  return isa != Isa::kAvx512Bf16 || !__builtin_cpu_is("intel");
#else
  return isa == Isa::kGeneric;
#endif
}

Isa initial() {
  const char* name = std::getenv("PLUM_CPU_ISA");
  if (name != nullptr && *name != 0) return by_name(name, "PLUM_CPU_ISA");
  Isa best = Isa::kGeneric;
  for (int i = 1; i < kNumIsas; ++i) {
    if (supported(static_cast<Isa>(i)) && worthwhile(static_cast<Isa>(i))) {
      best = static_cast<Isa>(i);
    }
  }
  return best;
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

void set_isa(const std::string& name) { active().store(by_name(name, "CPU instruction set")); }

}  // namespace plum::cpu
