// The body of codebook_sums, compiled once per instruction set inside the namespace PLUM_ISA.
// Includes nothing: an inline library function compiled here could be the copy the linker keeps.

namespace plum::cpu::PLUM_ISA {
namespace {

// Rows that x is fetched ahead: what the memory takes to answer.
constexpr int64_t kAhead = 12;
constexpr int kVector = 8;

typedef float Floats __attribute__((vector_size(kVector * sizeof(float))));
typedef double Doubles __attribute__((vector_size(kVector * sizeof(double))));
typedef uint32_t Words __attribute__((vector_size(kVector * sizeof(uint32_t))));
typedef uint16_t Halves __attribute__((vector_size(kVector * sizeof(uint16_t))));

// Element types of rows; widen() is exact.
struct Float32 {
  using Element = float;
  static void widen(const float* from, Floats& to) { __builtin_memcpy(&to, from, sizeof to); }
};

struct Bfloat16 {
  using Element = uint16_t;
  static void widen(const uint16_t* from, Floats& to) {
    Halves half;
    __builtin_memcpy(&half, from, sizeof half);
    to = reinterpret_cast<Floats>(__builtin_convertvector(half, Words) << 16);
  }
};

struct Float16 {
  using Element = uint16_t;
  static void widen(const uint16_t* from, Floats& to) {
    Halves half;
    __builtin_memcpy(&half, from, sizeof half);
    const Words bits = __builtin_convertvector(half, Words), magnitude = bits & 0x7fff;
    // As from_half in simd.inl: exact, and without denormal floats, which may be flushed to zero.
    const Words shifted = magnitude << 13;
    const Floats fraction = reinterpret_cast<Floats>(shifted + 0x38800000) - 0x1p-14f;
    const Words small = reinterpret_cast<Words>(magnitude < 0x400);
    const Words infinite = reinterpret_cast<Words>(magnitude >= 0x7c00);
    const Words normal = shifted + (112u << 23) + (infinite & 112u << 23);
    const Words value = (small & reinterpret_cast<Words>(fraction)) | (~small & normal);
    to = reinterpret_cast<Floats>(value | (bits & 0x8000) << 16);
  }
};

// Adds `count` of kColumns columns of every row; the residual stays in registers over the levels.
template <typename Type, int kColumns>
void add_rows(const typename Type::Element* x, int64_t rows, int64_t width, int64_t count,
              const int32_t* slots, int64_t levels, const float* codebooks, double* sums) {
  using Element = typename Type::Element;
  constexpr int kVectors = kColumns / kVector;
  constexpr int64_t kLine = 64 / sizeof(Element);
  Element padded[kColumns] = {};
  for (int64_t n = 0; n < rows; ++n) {
    const Element* row = x + n * width;
    // A prefetch past the last row does nothing.
    for (int64_t d = 0; d < kColumns; d += kLine) __builtin_prefetch(row + kAhead * width + d);
    if (count < kColumns) {
      __builtin_memcpy(padded, row, count * sizeof(Element));
      row = padded;
    }
    Floats r[kVectors];
    for (int v = 0; v < kVectors; ++v) Type::widen(row + v * kVector, r[v]);
    for (int64_t level = 0; level < levels; ++level) {
      const int64_t at = int64_t{slots[n * levels + level]} * kColumns;
      auto* sum = reinterpret_cast<Doubles*>(sums + at);
      const auto* codeword = reinterpret_cast<const Floats*>(codebooks + at);
      for (int v = 0; v < kVectors; ++v) sum[v] += __builtin_convertvector(r[v], Doubles);
      if (level + 1 == levels) break;
      for (int v = 0; v < kVectors; ++v) r[v] -= codeword[v];
    }
  }
}

template <int kColumns>
void add_columns(const void* x, int type, int64_t rows, int64_t width, int64_t first, int64_t count,
                 const int32_t* slots, int64_t levels, const float* codebooks, double* sums) {
  if (type == 0) {
    add_rows<Float32, kColumns>(static_cast<const float*>(x) + first, rows, width, count, slots,
                                levels, codebooks, sums);
    return;
  }
  const uint16_t* half = static_cast<const uint16_t*>(x) + first;
  const auto add = type == 1 ? &add_rows<Bfloat16, kColumns> : &add_rows<Float16, kColumns>;
  add(half, rows, width, count, slots, levels, codebooks, sums);
}

}  // namespace

void codebook_sums_columns(const void* x, int type, int64_t rows, int64_t width, int64_t first,
                           int64_t count, int64_t columns, const int32_t* slots, int64_t levels,
                           const float* codebooks, double* sums) {
  const auto add = columns == 64 ? &add_columns<64> : &add_columns<32>;
  add(x, type, rows, width, first, count, slots, levels, codebooks, sums);
}

}  // namespace plum::cpu::PLUM_ISA
