// What every CUDA launcher needs.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace plum::cuda {

// Throws std::runtime_error when the launch before it failed.
inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(error));
  }
}

}  // namespace plum::cuda
