// Memory that begins at a cache line, and sizes in whole units.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace plum::cpu {

inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

struct AlignedFree {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t{64}); }
};

template <typename T>
using Aligned = std::unique_ptr<T[], AlignedFree>;

// `count` numbers, not initialized.
template <typename T>
Aligned<T> aligned(int64_t count) {
  return Aligned<T>(static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{64})));
}

}  // namespace plum::cpu
