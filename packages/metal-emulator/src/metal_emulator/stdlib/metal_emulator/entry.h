// The interface between the runtime and a kernel.
#pragma once

#include "abi.h"
#include "signature.h"
#include "types.h"

namespace mtl {

template <class T>
MTL_INLINE T function_constant(int index) {
  const ulong bits = mtl_function_constant(index);
  T value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// Function constants are variables, set before each launch that has values for them.
struct on_constants_set {
  static inline on_constants_set* first = nullptr;
  void (*set)();
  on_constants_set* next;

  explicit on_constants_set(void (*setter)()) : set(setter), next(first) { first = this; }
};

// The unit of race detection: an element of a vector, or a scalar, at most a word.
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
