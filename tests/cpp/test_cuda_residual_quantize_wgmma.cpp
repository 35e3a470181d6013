// The search for Hopper GPUs, in the same cases.
#define PLUM_WGMMA
#include "test_cuda_residual_quantize.cpp"
