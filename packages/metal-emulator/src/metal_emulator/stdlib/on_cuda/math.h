// Math functions on floats and integers, the types that a portable kernel computes in.
#pragma once

#include "types.h"

namespace metal {

using ::as_type;

template <class T>
constexpr bool is_floating_point_v =
    is_same_v<T, float> || is_same_v<T, __half> || is_same_v<T, __nv_bfloat16>;

template <class T>
struct numeric_limits;
template <>
struct numeric_limits<float> {
  static MTL_CONSTEXPR float max() { return 3.402823466e+38f; }
  static MTL_CONSTEXPR float lowest() { return -3.402823466e+38f; }
  static MTL_CONSTEXPR float min() { return 1.175494351e-38f; }
  static MTL_CONSTEXPR float epsilon() { return 1.1920929e-7f; }
  static MTL_INLINE float infinity() { return INFINITY; }
};

// ---- math
#define MTL_FLOAT_FUNCTIONS                  \
  MTL_OF_X(abs, fabsf(x))                    \
  MTL_OF_X(acos, acosf(x))                   \
  MTL_OF_X(asin, asinf(x))                   \
  MTL_OF_X(atan, atanf(x))                   \
  MTL_OF_X(ceil, ceilf(x))                   \
  MTL_OF_X(cos, cosf(x))                     \
  MTL_OF_X(cosh, coshf(x))                   \
  MTL_OF_X(exp, expf(x))                     \
  MTL_OF_X(exp2, exp2f(x))                   \
  MTL_OF_X(fabs, fabsf(x))                   \
  MTL_OF_X(floor, floorf(x))                 \
  MTL_OF_X(log, logf(x))                     \
  MTL_OF_X(log2, log2f(x))                   \
  MTL_OF_X(log10, log10f(x))                 \
  MTL_OF_X(rint, rintf(x))                   \
  MTL_OF_X(round, roundf(x))                 \
  MTL_OF_X(rsqrt, 1.0f / sqrtf(x))           \
  MTL_OF_X(sin, sinf(x))                     \
  MTL_OF_X(sinh, sinhf(x))                   \
  MTL_OF_X(sqrt, sqrtf(x))                   \
  MTL_OF_X(tan, tanf(x))                     \
  MTL_OF_X(tanh, tanhf(x))                   \
  MTL_OF_X(trunc, truncf(x))                 \
  MTL_OF_X_Y(atan2, atan2f(x, y))            \
  MTL_OF_X_Y(copysign, copysignf(x, y))      \
  MTL_OF_X_Y(divide, x / y)                  \
  MTL_OF_X_Y(fmax, fmaxf(x, y))              \
  MTL_OF_X_Y(fmin, fminf(x, y))              \
  MTL_OF_X_Y(fmod, fmodf(x, y))              \
  MTL_OF_X_Y(max, fmaxf(x, y))               \
  MTL_OF_X_Y(min, fminf(x, y))               \
  MTL_OF_X_Y(pow, powf(x, y))                \
  MTL_OF_X_Y_Z(clamp, fminf(fmaxf(x, y), z)) \
  MTL_OF_X_Y_Z(fma, fmaf(x, y, z))

#define MTL_OF_X(name, value)      \
  MTL_INLINE float name(float x) { \
    return value;                  \
  }
#define MTL_OF_X_Y(name, value)             \
  MTL_INLINE float name(float x, float y) { \
    return value;                           \
  }
#define MTL_OF_X_Y_Z(name, value)                    \
  MTL_INLINE float name(float x, float y, float z) { \
    return value;                                    \
  }

namespace mtl_precise {
MTL_FLOAT_FUNCTIONS
}
using namespace mtl_precise;
namespace precise = mtl_precise;
namespace fast {
MTL_FLOAT_FUNCTIONS
}

#define MTL_OF_INTEGERS(T)                 \
  MTL_INLINE T min(T a, T b) {             \
    return b < a ? b : a;                  \
  }                                        \
  MTL_INLINE T max(T a, T b) {             \
    return a < b ? b : a;                  \
  }                                        \
  MTL_INLINE T clamp(T x, T low, T high) { \
    return min(max(x, low), high);         \
  }
MTL_OF_INTEGERS(int)
MTL_OF_INTEGERS(uint)
MTL_OF_INTEGERS(long)
MTL_OF_INTEGERS(ulong)
#undef MTL_OF_INTEGERS
using mtl_precise::clamp;
using mtl_precise::max;
using mtl_precise::min;

MTL_INLINE int abs(int x) {
  return x < 0 ? -x : x;
}
MTL_INLINE bool isnan(float x) {
  return x != x;
}
MTL_INLINE bool isinf(float x) {
  return fabsf(x) == INFINITY;
}
MTL_INLINE bool isfinite(float x) {
  return fabsf(x) < INFINITY;
}
template <class T>
MTL_INLINE T select(T otherwise, T chosen, bool condition) {
  return condition ? chosen : otherwise;
}
template <class T, int N>
MTL_INLINE T dot(vec<T, N> a, vec<T, N> b) {
  T sum = a[0] * b[0];
  for (int i = 1; i < N; ++i) {
    sum += a[i] * b[i];
  }
  return sum;
}

}  // namespace metal
