// Math, common, integer, relational and geometric functions. A half or bfloat function computes in
// float and rounds once.
#pragma once

#include "limits.h"

// Applies F(name, value) to each function of a float x.
#define MTL_FUNCTIONS_OF_X(F)                            \
  F(acos, __builtin_acosf(x))                            \
  F(acosh, __builtin_acoshf(x))                          \
  F(asin, __builtin_asinf(x))                            \
  F(asinh, __builtin_asinhf(x))                          \
  F(atan, __builtin_atanf(x))                            \
  F(atanh, __builtin_atanhf(x))                          \
  F(ceil, __builtin_ceilf(x))                            \
  F(cos, __builtin_cosf(x))                              \
  F(cosh, __builtin_coshf(x))                            \
  F(cospi, __builtin_cosf(x* M_PI_F))                    \
  F(exp, __builtin_expf(x))                              \
  F(exp10, __builtin_powf(10.0f, x))                     \
  F(exp2, __builtin_exp2f(x))                            \
  F(fabs, __builtin_fabsf(x))                            \
  F(floor, __builtin_floorf(x))                          \
  F(fract, x - __builtin_floorf(x))                      \
  F(log, __builtin_logf(x))                              \
  F(log10, __builtin_log10f(x))                          \
  F(log2, __builtin_log2f(x))                            \
  F(rint, __builtin_rintf(x))                            \
  F(round, __builtin_roundf(x))                          \
  F(rsqrt, 1.0f / __builtin_sqrtf(x))                    \
  F(sin, __builtin_sinf(x))                              \
  F(sinh, __builtin_sinhf(x))                            \
  F(sinpi, __builtin_sinf(x* M_PI_F))                    \
  F(sqrt, __builtin_sqrtf(x))                            \
  F(tan, __builtin_tanf(x))                              \
  F(tanh, __builtin_tanhf(x))                            \
  F(trunc, __builtin_truncf(x))                          \
  F(abs, __builtin_fabsf(x))                             \
  F(sign, x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : 0.0f * x) \
  F(saturate, __builtin_fminf(__builtin_fmaxf(x, 0.0f), 1.0f))

#define MTL_FUNCTIONS_OF_X_Y(F)          \
  F(atan2, __builtin_atan2f(x, y))       \
  F(copysign, __builtin_copysignf(x, y)) \
  F(divide, x / y)                       \
  F(fdim, __builtin_fdimf(x, y))         \
  F(fmax, __builtin_fmaxf(x, y))         \
  F(fmin, __builtin_fminf(x, y))         \
  F(fmod, __builtin_fmodf(x, y))         \
  F(max, __builtin_fmaxf(x, y))          \
  F(min, __builtin_fminf(x, y))          \
  F(pow, __builtin_powf(x, y))           \
  F(powr, __builtin_powf(x, y))

#define MTL_FUNCTIONS_OF_X_Y_Z(F)                     \
  F(clamp, __builtin_fminf(__builtin_fmaxf(x, y), z)) \
  F(fma, __builtin_fmaf(x, y, z))                     \
  F(mix, x + (y - x) * z)

#define MTL_FOR_EACH_FLOAT(F, name, value) \
  F(float, name, value)                    \
  F(half, name, value)                     \
  F(bfloat, name, value)

#define MTL_OF_X(T, name, value) \
  MTL_INLINE T name(T a) {       \
    const float x = float(a);    \
    return T(value);             \
  }
#define MTL_OF_X_Y(T, name, value) \
  MTL_INLINE T name(T a, T b) {    \
    const float x = float(a);      \
    const float y = float(b);      \
    return T(value);               \
  }
#define MTL_OF_X_Y_Z(T, name, value) \
  MTL_INLINE T name(T a, T b, T c) { \
    const float x = float(a);        \
    const float y = float(b);        \
    const float z = float(c);        \
    return T(value);                 \
  }

// A function of a vector applies to each element.
#define MTL_VECTOR_OF_X(name)                    \
  template <class V, mtl::if_vector<V> = 0>      \
  MTL_INLINE V name(V a) {                       \
    V result;                                    \
    for (int i = 0; i < mtl::count_of<V>; ++i) { \
      result[i] = name(mtl::element_t<V>(a[i])); \
    }                                            \
    return result;                               \
  }
#define MTL_VECTOR_OF_X_Y(name)                                           \
  template <class V, mtl::if_vector<V> = 0>                               \
  MTL_INLINE V name(V a, V b) {                                           \
    V result;                                                             \
    for (int i = 0; i < mtl::count_of<V>; ++i) {                          \
      result[i] = name(mtl::element_t<V>(a[i]), mtl::element_t<V>(b[i])); \
    }                                                                     \
    return result;                                                        \
  }
#define MTL_VECTOR_OF_X_Y_Z(name)                  \
  template <class V, mtl::if_vector<V> = 0>        \
  MTL_INLINE V name(V a, V b, V c) {               \
    using E = mtl::element_t<V>;                   \
    V result;                                      \
    for (int i = 0; i < mtl::count_of<V>; ++i) {   \
      result[i] = name(E(a[i]), E(b[i]), E(c[i])); \
    }                                              \
    return result;                                 \
  }

#define MTL_DEFINE_1(name, value)           \
  MTL_FOR_EACH_FLOAT(MTL_OF_X, name, value) \
  MTL_VECTOR_OF_X(name)
#define MTL_DEFINE_2(name, value)             \
  MTL_FOR_EACH_FLOAT(MTL_OF_X_Y, name, value) \
  MTL_VECTOR_OF_X_Y(name)
#define MTL_DEFINE_3(name, value)               \
  MTL_FOR_EACH_FLOAT(MTL_OF_X_Y_Z, name, value) \
  MTL_VECTOR_OF_X_Y_Z(name)
#define MTL_DEFINE_FLOAT_FUNCTIONS   \
  MTL_FUNCTIONS_OF_X(MTL_DEFINE_1)   \
  MTL_FUNCTIONS_OF_X_Y(MTL_DEFINE_2) \
  MTL_FUNCTIONS_OF_X_Y_Z(MTL_DEFINE_3)

namespace metal {

MTL_DEFINE_FLOAT_FUNCTIONS

// fast:: and precise:: are the same on the host; on a GPU they differ.
namespace fast {
MTL_DEFINE_FLOAT_FUNCTIONS
}
namespace precise {
MTL_DEFINE_FLOAT_FUNCTIONS
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
MTL_OF_INTEGERS(char)
MTL_OF_INTEGERS(uchar)
MTL_OF_INTEGERS(short)
MTL_OF_INTEGERS(ushort)
MTL_OF_INTEGERS(int)
MTL_OF_INTEGERS(uint)
MTL_OF_INTEGERS(long)
MTL_OF_INTEGERS(ulong)
#undef MTL_OF_INTEGERS

template <class T, mtl::if_integer<T> = 0>
MTL_INLINE T abs(T x) {
  return x < T(0) ? T(-x) : x;
}
template <class T, mtl::if_integer<T> = 0>
MTL_INLINE T absdiff(T a, T b) {
  return a < b ? T(b - a) : T(a - b);
}

MTL_INLINE uint popcount(uint x) {
  return __builtin_popcount(x);
}
MTL_INLINE uint clz(uint x) {
  return x ? __builtin_clz(x) : 32;
}
MTL_INLINE uint ctz(uint x) {
  return x ? __builtin_ctz(x) : 32;
}
MTL_INLINE uint mulhi(uint a, uint b) {
  return uint(ulong(a) * b >> 32);
}
MTL_INLINE int mulhi(int a, int b) {
  return int(long(a) * b >> 32);
}
MTL_INLINE uint rotate(uint x, uint by) {
  return x << (by & 31) | x >> (-by & 31);
}
MTL_INLINE uint reverse_bits(uint x) {
  uint result = 0;
  for (int i = 0; i < 32; ++i) {
    result |= (x >> i & 1) << (31 - i);
  }
  return result;
}

#define MTL_OF_BITS(name, test)         \
  MTL_INLINE bool name(float x) {       \
    const uint bits = as_type<uint>(x); \
    return test;                        \
  }                                     \
  MTL_INLINE bool name(half x) {        \
    return name(float(x));              \
  }                                     \
  MTL_INLINE bool name(bfloat x) {      \
    return name(float(x));              \
  }
MTL_OF_BITS(isnan, (bits & 0x7fffffffu) > 0x7f800000u)
MTL_OF_BITS(isinf, (bits & 0x7fffffffu) == 0x7f800000u)
MTL_OF_BITS(isfinite, (bits & 0x7f800000u) != 0x7f800000u)
MTL_OF_BITS(signbit, (bits >> 31) != 0)
#undef MTL_OF_BITS

template <class T>
MTL_INLINE T select(T otherwise, T chosen, bool condition) {
  return condition ? chosen : otherwise;
}
MTL_INLINE float ldexp(float x, int exponent) {
  return __builtin_ldexpf(x, exponent);
}
MTL_INLINE float step(float edge, float x) {
  return x < edge ? 0.0f : 1.0f;
}

template <class V, mtl::if_vector<V> = 0>
MTL_INLINE mtl::element_t<V> dot(V a, V b) {
  mtl::element_t<V> sum = a[0] * b[0];
  for (int i = 1; i < mtl::count_of<V>; ++i) {
    sum += a[i] * b[i];
  }
  return sum;
}
template <class V, mtl::if_vector<V> = 0>
MTL_INLINE mtl::element_t<V> length(V a) {
  return sqrt(dot(a, a));
}
template <class V, mtl::if_vector<V> = 0>
MTL_INLINE bool any(V a) {
  bool result = false;
  for (int i = 0; i < mtl::count_of<V>; ++i) {
    result |= bool(a[i]);
  }
  return result;
}
template <class V, mtl::if_vector<V> = 0>
MTL_INLINE bool all(V a) {
  bool result = true;
  for (int i = 0; i < mtl::count_of<V>; ++i) {
    result &= bool(a[i]);
  }
  return result;
}

}  // namespace metal
