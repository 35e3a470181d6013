// The residual search as its contract words it, one distance after another.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "check.h"

struct NaiveSearch {
  std::vector<int32_t> codes;
  std::vector<float> norms, residual;
  std::vector<int64_t> usage;  // from 7 up
  int64_t first_bad = -1;
};

// x [rows, width], codebooks [sum of sizes, width] of finite values.
inline NaiveSearch naive_search(const std::vector<float>& x, int64_t width,
                                const std::vector<float>& codebooks,
                                const std::vector<int64_t>& sizes) {
  NaiveSearch found;
  found.residual = x;
  found.usage.assign(codebooks.size() / width, 7);
  const auto rows = static_cast<int64_t>(x.size()) / width;
  for (int64_t n = 0; n < rows; ++n) {
    float* r = &found.residual[n * width];
    const float* codebook = codebooks.data();
    int64_t* usage = found.usage.data();
    for (int64_t size : sizes) {
      int64_t nearest = 0;
      double least = std::numeric_limits<double>::infinity();
      for (int64_t k = 0; k < size; ++k) {
        double distance = 0;
        for (int64_t d = 0; d < width; ++d) {
          // Volatile: the product is rounded before it is added.
          volatile double square = double{r[d]} - double{codebook[k * width + d]};
          square = square * square;
          distance += square;
        }
        if (distance < least) {
          least = distance;
          nearest = k;
        }
      }
      double norm = 0;
      bool finite = true;
      for (int64_t d = 0; d < width; ++d) {
        finite &= std::isfinite(r[d]);
        r[d] -= codebook[nearest * width + d];
        finite &= std::isfinite(r[d]);
        norm += double{r[d]} * r[d];
      }
      if (!finite && found.first_bad < 0) found.first_bad = n;
      found.codes.push_back(static_cast<int32_t>(nearest));
      found.norms.push_back(static_cast<float>(norm));
      ++usage[nearest];
      usage += size;
      codebook += size * width;
    }
  }
  return found;
}

inline void check_norms(const std::vector<float>& norms, const std::vector<float>& expected,
                        int64_t width) {
  CHECK(norms.size() == expected.size());
  for (size_t i = 0; i < expected.size(); ++i) {
    // At most 128 fp32 additions in a chain, and denormals may have been flushed.
    if (std::isinf(expected[i])) {
      CHECK(std::isinf(norms[i]));
    } else {
      CHECK(std::abs(norms[i] - expected[i]) <=
            1e-5f * expected[i] + static_cast<float>(width) * 1e-37f);
    }
  }
}
