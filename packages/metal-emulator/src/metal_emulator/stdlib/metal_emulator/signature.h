// Converts addresses and numbers to the typed parameters of a kernel function.
#pragma once

#include "traits.h"

namespace mtl {

// The parameter types of a kernel function.
template <class Function>
struct signature;
template <class... Arguments>
struct signature<void (*)(Arguments...)> {
  template <int I, class Head, class... Tail>
  struct pick : pick<I - 1, Tail...> {};
  template <class Head, class... Tail>
  struct pick<0, Head, Tail...> {
    using type = Head;
  };
  template <int I>
  using argument = typename pick<I, Arguments...>::type;
};

// A buffer parameter is a pointer, or a reference to a single value.
template <class T>
struct buffer;
template <class T>
struct buffer<T*> {
  static MTL_INLINE T* from(void* address) { return static_cast<T*>(address); }
};
template <class T>
struct buffer<T&> {
  static MTL_INLINE T& from(void* address) { return *static_cast<T*>(address); }
};

// A position is uint3, uint2 or uint, or the same with ushort.
template <class T>
MTL_INLINE T position(const uint32_t* xyz) {
  if constexpr (count_of<T> == 1) {
    return T(xyz[0]);
  } else {
    T result;
    for (int i = 0; i < count_of<T>; ++i) {
      result[i] = element_t<T>(xyz[i]);
    }
    return result;
  }
}

}  // namespace mtl
