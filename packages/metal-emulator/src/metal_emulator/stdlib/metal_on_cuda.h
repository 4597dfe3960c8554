// Definitions to compile a Metal kernel as CUDA. In its source threadgroup variables become
// __shared__, and the other address spaces are removed.
#pragma once

#include "on_cuda/atomic.h"
#include "on_cuda/math.h"
#include "on_cuda/simd.h"
#include "on_cuda/simdgroup_matrix.h"

using namespace metal;

#define MLX_MTL_PRAGMA_UNROLL _Pragma("unroll")
// nvcc makes a function a host function by default.
#define inline __device__ __inline__
