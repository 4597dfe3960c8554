// What a Metal kernel needs to be compiled as CUDA. Its text is the same but for threadgroup
// variables, which become __shared__, and the other address spaces, which vanish.
#pragma once

#include "on_cuda/atomic.h"
#include "on_cuda/math.h"
#include "on_cuda/simd.h"
#include "on_cuda/simdgroup_matrix.h"

using namespace metal;

#define MLX_MTL_PRAGMA_UNROLL _Pragma("unroll")
// nvcc makes a function a host function unless it is told otherwise.
#define inline __device__ __inline__
