// half, bfloat and vectors: classes for execution, clang's own types for the type check.
#pragma once

#include "traits.h"
#if defined(MTL_TYPE_CHECK)
#include "checked_types.h"
#else
#include "small_float.h"
#include "vector.h"
#endif

#define MTL_VECTOR_NAMES(T)      \
  typedef metal::vec<T, 2> T##2; \
  typedef metal::vec<T, 3> T##3; \
  typedef metal::vec<T, 4> T##4; \
  namespace metal {              \
  using ::T##2;                  \
  using ::T##3;                  \
  using ::T##4;                  \
  }

MTL_VECTOR_NAMES(float)
MTL_VECTOR_NAMES(half)
MTL_VECTOR_NAMES(bfloat)
MTL_VECTOR_NAMES(char)
MTL_VECTOR_NAMES(uchar)
MTL_VECTOR_NAMES(short)
MTL_VECTOR_NAMES(ushort)
MTL_VECTOR_NAMES(int)
MTL_VECTOR_NAMES(uint)
MTL_VECTOR_NAMES(long)
MTL_VECTOR_NAMES(ulong)
#if !defined(MTL_TYPE_CHECK)
MTL_VECTOR_NAMES(bool)
#endif
#undef MTL_VECTOR_NAMES

namespace metal {

using ::bfloat;
using ::half;

template <class T>
constexpr bool is_floating_point_v =
    is_same_v<T, float> || is_same_v<T, half> || is_same_v<T, bfloat>;
template <class T>
struct is_floating_point : bool_constant<is_floating_point_v<T>> {};
template <class T>
constexpr bool is_arithmetic_v = is_integral_v<T> || is_floating_point_v<T>;
template <class T>
struct is_arithmetic : bool_constant<is_arithmetic_v<T>> {};
template <class T>
constexpr bool is_signed_v = is_floating_point_v<T> || std::is_signed<T>::value;
template <class T>
struct is_signed : bool_constant<is_signed_v<T>> {};
template <class T>
constexpr bool is_unsigned_v = std::is_unsigned<T>::value;
template <class T>
struct is_unsigned : bool_constant<is_unsigned_v<T>> {};

}  // namespace metal

template <class T, class U>
MTL_INLINE T as_type(U value) {
  static_assert(sizeof(T) == sizeof(U), "as_type needs types of one size");
  T result;
  __builtin_memcpy(&result, &value, sizeof result);
  return result;
}
namespace metal {
using ::as_type;
}

#if defined(MTL_TYPE_CHECK)
#include "vector_constructors.h"
#endif
