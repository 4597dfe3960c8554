// Metal's types and constants in CUDA. Vectors are the classes of this library, as CUDA's own have
// no operators.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../metal_emulator/signature.h"
#include "../metal_emulator/vector.h"

typedef __nv_bfloat16 bfloat;
typedef __nv_bfloat16 bfloat16_t;
typedef __half float16_t;

#define float2 metal::vec<float, 2>
#define float3 metal::vec<float, 3>
#define float4 metal::vec<float, 4>
#define half2 metal::vec<__half, 2>
#define half3 metal::vec<__half, 3>
#define half4 metal::vec<__half, 4>
#define bfloat2 metal::vec<__nv_bfloat16, 2>
#define bfloat3 metal::vec<__nv_bfloat16, 3>
#define bfloat4 metal::vec<__nv_bfloat16, 4>
#define int2 metal::vec<int, 2>
#define int3 metal::vec<int, 3>
#define int4 metal::vec<int, 4>
#define uint2 metal::vec<unsigned, 2>
#define uint3 metal::vec<unsigned, 3>
#define uint4 metal::vec<unsigned, 4>
#define ushort2 metal::vec<unsigned short, 2>
#define ushort3 metal::vec<unsigned short, 3>
#define ushort4 metal::vec<unsigned short, 4>

#if !defined(INFINITY)
#define INFINITY (__int_as_float(0x7f800000))
#endif
#if !defined(NAN)
#define NAN (__int_as_float(0x7fc00000))
#endif
#define M_PI_F 3.14159265358979f
#define M_LOG2E_F 1.44269504f
#define M_LN2_F 0.69314718f

template <class T, class U>
MTL_INLINE T as_type(U value) {
  static_assert(sizeof(T) == sizeof(U), "as_type needs types of one size");
  T result;
  memcpy(&result, &value, sizeof result);
  return result;
}
