// For the type check: clang's vectors have no constructor syntax in C++. Function-like macros
// define it: float4(a, b, c, d) calls a function, float4 alone is the type.
#pragma once

namespace mtl {

template <class V, class A>
MTL_INLINE void append(V& vector, int& filled, const A& value) {
  if constexpr (count_of<A> == 1) {
    vector[filled++] = static_cast<element_t<V>>(value);
  } else {
    for (int i = 0; i < count_of<A>; ++i) {
      vector[filled++] = static_cast<element_t<V>>(value[i]);
    }
  }
}

template <class V, class A>
MTL_INLINE V make(A value) {
  static_assert(count_of<A> == 1 || count_of<A> == count_of<V>, "vectors of different sizes");
  V result;
  int filled = 0;
  if constexpr (count_of<A> == 1) {
    for (int i = 0; i < count_of<V>; ++i) {
      append(result, filled, value);
    }
  } else {
    append(result, filled, value);
  }
  return result;
}

template <class V, class A, class B, class... Rest>
MTL_INLINE V make(A a, B b, Rest... rest) {
  V result;
  int filled = 0;
  append(result, filled, a);
  append(result, filled, b);
  (append(result, filled, rest), ...);
  return result;
}

#define MTL_MAKERS(T)                               \
  template <class... A>                             \
  MTL_INLINE metal::vec<T, 2> make_##T##2(A... a) { \
    return make<metal::vec<T, 2>>(a...);            \
  }                                                 \
  template <class... A>                             \
  MTL_INLINE metal::vec<T, 3> make_##T##3(A... a) { \
    return make<metal::vec<T, 3>>(a...);            \
  }                                                 \
  template <class... A>                             \
  MTL_INLINE metal::vec<T, 4> make_##T##4(A... a) { \
    return make<metal::vec<T, 4>>(a...);            \
  }
MTL_MAKERS(float)
MTL_MAKERS(half)
MTL_MAKERS(bfloat)
MTL_MAKERS(short)
MTL_MAKERS(ushort)
MTL_MAKERS(int)
MTL_MAKERS(uint)
MTL_MAKERS(ulong)
#undef MTL_MAKERS

}  // namespace mtl

#define float2(...) ::mtl::make_float2(__VA_ARGS__)
#define float3(...) ::mtl::make_float3(__VA_ARGS__)
#define float4(...) ::mtl::make_float4(__VA_ARGS__)
#define half2(...) ::mtl::make_half2(__VA_ARGS__)
#define half3(...) ::mtl::make_half3(__VA_ARGS__)
#define half4(...) ::mtl::make_half4(__VA_ARGS__)
#define bfloat2(...) ::mtl::make_bfloat2(__VA_ARGS__)
#define bfloat3(...) ::mtl::make_bfloat3(__VA_ARGS__)
#define bfloat4(...) ::mtl::make_bfloat4(__VA_ARGS__)
#define short2(...) ::mtl::make_short2(__VA_ARGS__)
#define short3(...) ::mtl::make_short3(__VA_ARGS__)
#define short4(...) ::mtl::make_short4(__VA_ARGS__)
#define ushort2(...) ::mtl::make_ushort2(__VA_ARGS__)
#define ushort3(...) ::mtl::make_ushort3(__VA_ARGS__)
#define ushort4(...) ::mtl::make_ushort4(__VA_ARGS__)
#define int2(...) ::mtl::make_int2(__VA_ARGS__)
#define int3(...) ::mtl::make_int3(__VA_ARGS__)
#define int4(...) ::mtl::make_int4(__VA_ARGS__)
#define uint2(...) ::mtl::make_uint2(__VA_ARGS__)
#define uint3(...) ::mtl::make_uint3(__VA_ARGS__)
#define uint4(...) ::mtl::make_uint4(__VA_ARGS__)
#define ulong2(...) ::mtl::make_ulong2(__VA_ARGS__)
#define ulong3(...) ::mtl::make_ulong3(__VA_ARGS__)
#define ulong4(...) ::mtl::make_ulong4(__VA_ARGS__)
