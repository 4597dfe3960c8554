// Relaxed atomics on 32-bit words, in device and threadgroup memory.
#pragma once

#include "abi.h"
#include "types.h"

namespace metal {

enum memory_order { memory_order_relaxed };

template <class T>
struct atomic {
  static_assert(sizeof(T) <= 4, "atomics are 32 bits wide");
  T value;
};
template <class T>
using _atomic = atomic<T>;
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;
typedef atomic<bool> atomic_bool;

}  // namespace metal

namespace mtl {

// The address without its address space, for the runtime.
template <class P>
MTL_INLINE void* address_of(P pointer) {
  return (void*)(uintptr_t)pointer;
}

template <class T>
MTL_INLINE T atomic_operation(void* address, int operation, T value) {
  bool done;
  return as_type<T>(mtl_atomic(address, operation, as_type<uint>(value), 0, &done));
}

// The operation for this type, or -1: the only atomic operation of Metal on floats is addition.
template <class T>
constexpr int choose(int of_unsigned, int of_signed, int of_float) {
  return metal::is_floating_point_v<T> ? of_float
         : std::is_signed<T>::value    ? of_signed
                                       : of_unsigned;
}

}  // namespace mtl

#define MTL_READ_MODIFY_WRITE(space, name, of_unsigned, of_signed, of_float)      \
  template <class T, class U>                                                     \
  MTL_INLINE T name(volatile space atomic<T>* object, U operand, memory_order) {  \
    constexpr int operation = mtl::choose<T>(of_unsigned, of_signed, of_float);   \
    static_assert(operation >= 0, "Metal has no such atomic for floats");         \
    return mtl::atomic_operation(mtl::address_of(object), operation, T(operand)); \
  }

#define MTL_ATOMICS(space)                                                                         \
  template <class T>                                                                               \
  MTL_INLINE T atomic_load_explicit(const volatile space atomic<T>* object, memory_order) {        \
    return mtl::atomic_operation(mtl::address_of(object), MTL_LOAD, T(0));                         \
  }                                                                                                \
  template <class T, class U>                                                                      \
  MTL_INLINE void atomic_store_explicit(volatile space atomic<T>* object, U value, memory_order) { \
    mtl::atomic_operation(mtl::address_of(object), MTL_STORE, T(value));                           \
  }                                                                                                \
  template <class T>                                                                               \
  MTL_INLINE bool atomic_compare_exchange_weak_explicit(volatile space atomic<T>* object,          \
                                                        thread T* expected, T desired,             \
                                                        memory_order, memory_order) {              \
    bool done;                                                                                     \
    *expected = as_type<T>(mtl_atomic(mtl::address_of(object), MTL_COMPARE_EXCHANGE,               \
                                      as_type<uint>(desired), as_type<uint>(*expected), &done));   \
    return done;                                                                                   \
  }                                                                                                \
  MTL_READ_MODIFY_WRITE(space, atomic_exchange_explicit, MTL_EXCHANGE, MTL_EXCHANGE, MTL_EXCHANGE) \
  MTL_READ_MODIFY_WRITE(space, atomic_fetch_add_explicit, MTL_ADD, MTL_ADD, MTL_ADD_FLOAT)         \
  MTL_READ_MODIFY_WRITE(space, atomic_fetch_sub_explicit, MTL_SUB, MTL_SUB, -1)                    \
  MTL_READ_MODIFY_WRITE(space, atomic_fetch_max_explicit, MTL_MAX, MTL_MAX_SIGNED, -1)             \
  MTL_READ_MODIFY_WRITE(space, atomic_fetch_min_explicit, MTL_MIN, MTL_MIN_SIGNED, -1)             \
  MTL_READ_MODIFY_WRITE(space, atomic_fetch_and_explicit, MTL_AND, MTL_AND, -1)                    \
  MTL_READ_MODIFY_WRITE(space, atomic_fetch_or_explicit, MTL_OR, MTL_OR, -1)                       \
  MTL_READ_MODIFY_WRITE(space, atomic_fetch_xor_explicit, MTL_XOR, MTL_XOR, -1)

namespace metal {
#if defined(MTL_TYPE_CHECK)
MTL_ATOMICS(device)
MTL_ATOMICS(threadgroup)
#else
MTL_ATOMICS()
#endif
}  // namespace metal
