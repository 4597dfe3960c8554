// Relaxed atomics.
#pragma once

#include "types.h"

namespace metal {

enum memory_order { memory_order_relaxed };
template <class T>
struct atomic {
  T value;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;
template <class T>
MTL_INLINE T atomic_load_explicit(const volatile atomic<T>* object, memory_order) {
  return object->value;
}
template <class T, class U>
MTL_INLINE void atomic_store_explicit(volatile atomic<T>* object, U value, memory_order) {
  object->value = T(value);
}
#define MTL_ATOMIC(name, function)                                       \
  template <class T, class U>                                            \
  MTL_INLINE T name(volatile atomic<T>* object, U value, memory_order) { \
    return function(const_cast<T*>(&object->value), T(value));           \
  }
MTL_ATOMIC(atomic_exchange_explicit, atomicExch)
MTL_ATOMIC(atomic_fetch_add_explicit, atomicAdd)
MTL_ATOMIC(atomic_fetch_max_explicit, atomicMax)
MTL_ATOMIC(atomic_fetch_min_explicit, atomicMin)
MTL_ATOMIC(atomic_fetch_and_explicit, atomicAnd)
MTL_ATOMIC(atomic_fetch_or_explicit, atomicOr)
MTL_ATOMIC(atomic_fetch_xor_explicit, atomicXor)
#undef MTL_ATOMIC

}  // namespace metal
