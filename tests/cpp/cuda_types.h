// The types and functions of CUDA that csrc/cuda uses and that need no threads; see cuda_on_cpu.h.
#pragma once

#include <math.h>
#include <stdint.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

using std::max;
using std::min;

template <typename To, typename From>
To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline int __float_as_int(float x) { return same_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return same_bits<unsigned>(x); }
inline float __int_as_float(int x) { return same_bits<float>(x); }
inline float __uint_as_float(unsigned x) { return same_bits<float>(x); }
inline long long __double_as_longlong(double x) { return same_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return same_bits<double>(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) {
  // Rounded before anything is added to it.
  volatile double product = a * b;
  return product;
}

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <typename T>
T __ldg(const T* at) {
  return *at;
}
template <typename T>
T __ldcs(const T* at) {
  return *at;
}

struct __half {
  uint16_t bits;
};
struct __half2 {
  __half x, y;
};

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }

inline __half __double2half(double value) {
  const auto sign = static_cast<uint16_t>(signbit(value) ? 0x8000 : 0);
  const double size = fabs(value);
  uint16_t bits = 0x7c00;
  if (isnan(value)) {
    bits = 0x7e00;
  } else if (size < 0x1p-14) {
    bits = static_cast<uint16_t>(nearbyint(size * 0x1p24));
  } else if (size < 65520) {
    // A fraction that rounds up to 2048 carries into the exponent.
    const int exponent = ilogb(size);
    bits = static_cast<uint16_t>((exponent + 14) * 1024 + nearbyint(ldexp(size, 10 - exponent)));
  }
  return {static_cast<uint16_t>(sign | bits)};
}

inline float __half2float(__half half) {
  static const std::vector<float> table = [] {
    std::vector<float> values(1 << 16);
    for (int bits = 0; bits < 1 << 16; ++bits) {
      const int exponent = bits >> 10 & 31, fraction = bits & 1023;
      float value = exponent ? ldexpf(1024.f + fraction, exponent - 25) : ldexpf(fraction, -24);
      if (exponent == 31) value = fraction ? NAN : INFINITY;
      values[bits] = bits & 0x8000 ? -value : value;
    }
    return values;
  }();
  return table[half.bits];
}

inline __half2 __floats2half2_rn(float a, float b) { return {__double2half(a), __double2half(b)}; }
inline float2 __half22float2(__half2 a) { return {__half2float(a.x), __half2float(a.y)}; }

// A sum as tensor cores make it or better: terms are cut to 24 bits below the largest, the sum to
// fp32.
inline float sum_as_tensor_cores(const float* terms, int count) {
  float largest = 0, plain = 0;
  for (int i = 0; i < count; ++i) {
    largest = fmaxf(largest, fabsf(terms[i]));
    plain += terms[i];
  }
  if (!isfinite(plain) || largest == 0) return plain;
  const int lowest = ilogbf(largest) - 23;
  const double scale = ldexp(1.0, -lowest);
  int64_t sum = 0;
  for (int i = 0; i < count; ++i) sum += static_cast<int64_t>(terms[i] * scale);
  auto rounded = static_cast<float>(sum);
  if (fabs(rounded) > fabs(static_cast<double>(sum))) rounded = nextafterf(rounded, 0);
  return static_cast<float>(ldexp(rounded, lowest));
}

// Atomics: threads give way nowhere in them.

template <typename T>
T atomicAdd(T* at, std::common_type_t<T> value) {
  return std::exchange(*at, *at + value);
}

template <typename T>
T atomicMin(T* at, std::common_type_t<T> value) {
  return std::exchange(*at, std::min(*at, value));
}

template <typename T>
T atomicMax(T* at, std::common_type_t<T> value) {
  return std::exchange(*at, std::max(*at, value));
}

// The host's side.

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "none"; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline int cuda_on_cpu_shared_bytes = 227 << 10;
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = cuda_on_cpu_shared_bytes;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
  return bytes <= cuda_on_cpu_shared_bytes ? cudaSuccess : throw "too much shared memory";
}
