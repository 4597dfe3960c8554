// The keywords that Metal adds to C++.
#pragma once

// Include all host headers first: the keywords below are macros.
#if defined(__CUDACC_RTC__)
#include <cuda/std/cstdint>
#include <cuda/std/type_traits>
namespace std {
using namespace cuda::std;
}
#else
#include <stdint.h>

#include <type_traits>
#endif

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;

#if defined(__CUDACC__)

// For CUDA the source is rewritten instead, as `device` is part of CUDA's own attributes.
#define MTL_INLINE __device__ __forceinline__
#define MTL_CONSTEXPR __device__ __forceinline__
#define METAL_FUNC __device__ __forceinline__

#else

#define __METAL_VERSION__ 310

#if defined(MTL_TYPE_CHECK)
#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#else
#define device
#define constant
#define threadgroup
#endif
#define thread
#define kernel

// Functions of this library are always inlined, so that a finding is on the kernel's line.
#define MTL_INLINE inline __attribute__((always_inline))
#define MTL_CONSTEXPR __attribute__((always_inline)) constexpr
// In checked mode a kernel's own functions are not inlined, and calls in two branches are not
// merged.
#if defined(MTL_CHECKED) && defined(__clang__)
#define METAL_FUNC inline __attribute__((noinline, nomerge))
#elif defined(MTL_CHECKED)
#define METAL_FUNC inline __attribute__((noinline))
#else
#define METAL_FUNC inline __attribute__((always_inline))
#endif

#endif
