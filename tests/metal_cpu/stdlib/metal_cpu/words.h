// The words that Metal adds to C++.
#pragma once

// Every host header comes first: the words below are macros.
#include <type_traits>

#include "abi.h"

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

// Functions of this library always vanish into the kernel, so that a finding is on the kernel's
// line.
#define MTL_INLINE inline __attribute__((always_inline))
#define MTL_CONSTEXPR __attribute__((always_inline)) constexpr
// A kernel's own functions keep their frames where calls are watched.
#if defined(MTL_CHECKED)
#define METAL_FUNC inline __attribute__((noinline))
#else
#define METAL_FUNC inline __attribute__((always_inline))
#endif

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
