// metal::numeric_limits and the numeric constants.
#pragma once

#include "types.h"

#define INFINITY (__builtin_inff())
#define NAN (__builtin_nanf(""))
#define MAXFLOAT 3.402823466e+38f
#define HUGE_VALF INFINITY
#define FLT_EPSILON 1.1920929e-7f
#define M_E_F 2.71828183f
#define M_LOG2E_F 1.44269504f
#define M_LOG10E_F 0.43429448f
#define M_LN2_F 0.69314718f
#define M_LN10_F 2.30258509f
#define M_PI_F 3.14159265358979f
#define M_PI_2_F 1.57079633f
#define M_SQRT2_F 1.41421356f
#define M_SQRT1_2_F 0.70710678f

namespace metal {

template <class T>
struct numeric_limits {
  static_assert(is_integral_v<T>, "numeric_limits of a type that Metal does not have");
  static constexpr bool is_signed = std::is_signed<T>::value;
  static constexpr bool has_infinity = false;
  static constexpr int digits = 8 * sizeof(T) - is_signed;

  static constexpr T max() {
    return is_same_v<T, bool> ? T(1) : is_signed ? T(ulong(-1) >> (65 - 8 * sizeof(T))) : T(-1);
  }
  static constexpr T min() { return is_signed ? T(-max() - 1) : T(0); }
  static constexpr T lowest() { return min(); }
};

#define MTL_FLOAT_LIMITS(T, largest, smallest, step, bits) \
  template <>                                              \
  struct numeric_limits<T> {                               \
    static constexpr bool is_signed = true;                \
    static constexpr bool has_infinity = true;             \
    static constexpr int digits = bits;                    \
    static constexpr T max() {                             \
      return T(largest);                                   \
    }                                                      \
    static constexpr T lowest() {                          \
      return T(-largest);                                  \
    }                                                      \
    static constexpr T min() {                             \
      return T(smallest);                                  \
    }                                                      \
    static constexpr T epsilon() {                         \
      return T(step);                                      \
    }                                                      \
    static constexpr T infinity() {                        \
      return T(INFINITY);                                  \
    }                                                      \
    static constexpr T quiet_NaN() {                       \
      return T(NAN);                                       \
    }                                                      \
  };
MTL_FLOAT_LIMITS(float, 3.402823466e+38f, 1.175494351e-38f, 1.1920929e-7f, 24)
MTL_FLOAT_LIMITS(half, 65504.0f, 6.103515625e-05f, 9.765625e-4f, 11)
MTL_FLOAT_LIMITS(bfloat, 3.38953139e38f, 1.175494351e-38f, 7.8125e-3f, 8)
#undef MTL_FLOAT_LIMITS

}  // namespace metal
