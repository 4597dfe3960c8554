// Between the runtime, which knows addresses and numbers, and a kernel function with typed
// parameters.
#pragma once

#include "types.h"

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

// A position is uint3, uint2 or uint, or one of their ushort kin.
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

template <class T>
MTL_INLINE T function_constant(int index) {
  const ulong bits = mtl_function_constant(index);
  T value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// Function constants are variables here, set anew before each launch that gives values for them.
struct on_constants_set {
  static inline on_constants_set* first = nullptr;
  void (*set)();
  on_constants_set* next;

  explicit on_constants_set(void (*setter)()) : set(setter), next(first) { first = this; }
};

// The size of what a race can tell apart: a vector's element, a scalar, at most a word.
template <class T>
constexpr size_t granule() {
  using E = std::remove_all_extents_t<T>;
  constexpr size_t size = count_of<E> > 1 ? sizeof(element_t<E>) : alignof(E);
  return size < 4 ? size : 4;
}

template <class T>
MTL_INLINE void threadgroup_variable(T& variable, const char* name) {
  mtl_threadgroup_variable(&variable, sizeof variable, granule<T>(), name);
}

}  // namespace mtl
