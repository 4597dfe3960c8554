// Simdgroup and quadgroup functions for 32 lanes. Each is one exchange of values through the
// runtime, with the source line of the call: the lanes of an exchange must come from the same line.
#pragma once

#include "abi.h"
#include "math.h"

namespace mtl {

// Types of an exchange: no 64-bit type, no bool, no struct.
template <class T>
constexpr bool is_simd_type =
    metal::is_arithmetic_v<T> && sizeof(T) <= 4 && !metal::is_same_v<std::remove_cv_t<T>, bool>;
template <class T>
using if_simd = std::enable_if_t<is_simd_type<element_t<T>>, int>;
template <class T>
using if_simd_integer = std::enable_if_t<is_simd_type<T> && metal::is_integral_v<T>, int>;

// The values of all lanes after an exchange.
template <class T>
struct lanes {
  const char* slots;
  uint active;
  int own;  // this lane

  MTL_INLINE T at(int lane) const {
    T value;
    __builtin_memcpy(&value, slots + MTL_SLOT_BYTES * lane, sizeof value);
    return value;
  }
  // The value of a lane that does not exist is undefined; this thread's own value takes its place.
  MTL_INLINE T from(int lane) const {
    const bool there = lane >= 0 && lane < MTL_SIMD_WIDTH && (active >> lane & 1);
    return at(there ? lane : own);
  }
};

template <class T>
MTL_INLINE lanes<T> exchange(const T& value, int line, const char* operation) {
  static_assert(sizeof(T) <= MTL_SLOT_BYTES, "too large for a simdgroup operation");
  const char* slots = mtl_exchange(&value, sizeof value, line, operation);
  return {slots, mtl_active_lanes(), int(mtl_self()->lane)};
}

// Pairs of neighbours, then pairs of pairs: the order of a butterfly over lane ^ 1, ^ 2, ^ 4, ...
template <class T, class Combine>
MTL_INLINE T reduce(const lanes<T>& all, int width, Combine combine) {
  const int first = all.own & ~(width - 1);
  T values[MTL_SIMD_WIDTH];
  bool present[MTL_SIMD_WIDTH];
  for (int i = 0; i < width; ++i) {
    present[i] = all.active >> (first + i) & 1;
    if (present[i]) {
      values[i] = all.at(first + i);
    }
  }
  for (int step = 1; step < width; step *= 2) {
    for (int i = 0; i + step < width; i += 2 * step) {
      if (present[i] && present[i + step]) {
        values[i] = combine(values[i], values[i + step]);
      } else if (present[i + step]) {
        values[i] = values[i + step];
        present[i] = true;
      }
    }
  }
  return values[0];
}

template <class T, class Combine>
MTL_INLINE T scan(const lanes<T>& all, T identity, bool inclusive, Combine combine) {
  T result = identity;
  for (int lane = 0; lane < all.own + inclusive; ++lane) {
    if (all.active >> lane & 1) {
      result = combine(result, all.at(lane));
    }
  }
  return result;
}

// bfloat is summed in float and rounded once, as in MLX; other types in their own precision.
template <class T>
struct wide {
  using type = T;
};
template <>
struct wide<bfloat> {
  using type = float;
};
template <class T>
using wide_t = typename wide<T>::type;

}  // namespace mtl

namespace metal {

// ---- moves between lanes: `own` is this lane, `by` the argument
#define MTL_SHUFFLE(name, source)                                      \
  template <class T, mtl::if_simd<T> = 0>                              \
  MTL_INLINE T name(T value, ushort by, int line = __builtin_LINE()) { \
    const mtl::lanes<T> all = mtl::exchange(value, line, #name);       \
    [[maybe_unused]] const int own = all.own;                          \
    return all.from(source);                                           \
  }
MTL_SHUFFLE(simd_broadcast, by)
MTL_SHUFFLE(simd_shuffle, by)
MTL_SHUFFLE(simd_shuffle_up, own - by)
MTL_SHUFFLE(simd_shuffle_down, own + by)
MTL_SHUFFLE(simd_shuffle_xor, own ^ by)
MTL_SHUFFLE(simd_shuffle_rotate_up, (own - by) & 31)
MTL_SHUFFLE(simd_shuffle_rotate_down, (own + by) & 31)
MTL_SHUFFLE(quad_broadcast, (own & ~3) | (by & 3))
MTL_SHUFFLE(quad_shuffle, (own & ~3) | (by & 3))
MTL_SHUFFLE(quad_shuffle_xor, own ^ (by & 3))
#undef MTL_SHUFFLE

template <class T, mtl::if_simd<T> = 0>
MTL_INLINE T simd_broadcast_first(T value, int line = __builtin_LINE()) {
  const mtl::lanes<T> all = mtl::exchange(value, line, "simd_broadcast_first");
  return all.at(__builtin_ctz(all.active));
}

template <class T, mtl::if_simd<T> = 0>
MTL_INLINE T simd_shuffle_and_fill_up(T value, T fill, ushort by, int line = __builtin_LINE()) {
  struct both {
    T value;
    T fill;
  };
  const auto all = mtl::exchange(both{value, fill}, line, "simd_shuffle_and_fill_up");
  const int from = all.own - by;
  return from >= 0 ? all.at(from).value : all.at(from + MTL_SIMD_WIDTH).fill;
}

template <class T, mtl::if_simd<T> = 0>
MTL_INLINE T simd_shuffle_and_fill_down(T value, T fill, ushort by, int line = __builtin_LINE()) {
  struct both {
    T value;
    T fill;
  };
  const auto all = mtl::exchange(both{value, fill}, line, "simd_shuffle_and_fill_down");
  const int from = all.own + by;
  return from < MTL_SIMD_WIDTH ? all.at(from).value : all.at(from - MTL_SIMD_WIDTH).fill;
}

// ---- reductions
#define MTL_REDUCTION(name, constraint, combined)                         \
  template <class T, mtl::constraint<T> = 0>                              \
  MTL_INLINE T simd_##name(T value, int line = __builtin_LINE()) {        \
    using W = mtl::wide_t<T>;                                             \
    const auto all = mtl::exchange(W(value), line, "simd_" #name);        \
    return T(mtl::reduce(all, 32, [](W a, W b) { return W(combined); })); \
  }                                                                       \
  template <class T, mtl::constraint<T> = 0>                              \
  MTL_INLINE T quad_##name(T value, int line = __builtin_LINE()) {        \
    using W = mtl::wide_t<T>;                                             \
    const auto all = mtl::exchange(W(value), line, "quad_" #name);        \
    return T(mtl::reduce(all, 4, [](W a, W b) { return W(combined); }));  \
  }
MTL_REDUCTION(sum, if_simd, a + b)
MTL_REDUCTION(product, if_simd, a* b)
MTL_REDUCTION(max, if_simd, max(a, b))
MTL_REDUCTION(min, if_simd, min(a, b))
MTL_REDUCTION(and, if_simd_integer, a& b)
MTL_REDUCTION(or, if_simd_integer, a | b)
MTL_REDUCTION(xor, if_simd_integer, a ^ b)
#undef MTL_REDUCTION

MTL_INLINE bool simd_any(bool value, int line = __builtin_LINE()) {
  const mtl::lanes<int> all = mtl::exchange(int(value), line, "simd_any");
  return mtl::reduce(all, 32, [](int a, int b) { return a | b; }) != 0;
}
MTL_INLINE bool simd_all(bool value, int line = __builtin_LINE()) {
  const mtl::lanes<int> all = mtl::exchange(int(value), line, "simd_all");
  return mtl::reduce(all, 32, [](int a, int b) { return a & b; }) != 0;
}

class simd_vote {
 public:
  typedef ulong vote_t;
  explicit constexpr simd_vote(vote_t bits = 0) : bits_(bits) {}
  explicit constexpr operator vote_t() const { return bits_; }
  constexpr bool all() const { return bits_ == 0xffffffffu; }
  constexpr bool any() const { return bits_ != 0; }

 private:
  vote_t bits_;
};

MTL_INLINE simd_vote simd_ballot(bool value, int line = __builtin_LINE()) {
  const mtl::lanes<int> all = mtl::exchange(int(value), line, "simd_ballot");
  ulong bits = 0;
  for (int lane = 0; lane < MTL_SIMD_WIDTH; ++lane) {
    if ((all.active >> lane & 1) && all.at(lane)) {
      bits |= 1ul << lane;
    }
  }
  return simd_vote(bits);
}

// ---- prefix sums and products
#define MTL_PREFIX(name, identity, inclusive, combined)                                     \
  template <class T, mtl::if_simd<T> = 0>                                                   \
  MTL_INLINE T name(T value, int line = __builtin_LINE()) {                                 \
    using W = mtl::wide_t<T>;                                                               \
    const auto all = mtl::exchange(W(value), line, #name);                                  \
    return T(mtl::scan(all, W(identity), inclusive, [](W a, W b) { return W(combined); })); \
  }
MTL_PREFIX(simd_prefix_inclusive_sum, 0, true, a + b)
MTL_PREFIX(simd_prefix_exclusive_sum, 0, false, a + b)
MTL_PREFIX(simd_prefix_inclusive_product, 1, true, a* b)
MTL_PREFIX(simd_prefix_exclusive_product, 1, false, a* b)
#undef MTL_PREFIX

}  // namespace metal
