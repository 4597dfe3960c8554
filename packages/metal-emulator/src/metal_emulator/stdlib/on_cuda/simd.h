// Barriers, and simdgroups as warps.
#pragma once

#include "types.h"

namespace mtl {

constexpr unsigned kAllLanes = 0xffffffffu;

MTL_INLINE uint index_in_group() {
  return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
}
MTL_INLINE int lane() {
  return index_in_group() & 31;
}

// Shuffles any type as 32-bit words.
template <class T, class Shuffle>
MTL_INLINE T by_words(T value, Shuffle shuffle) {
  constexpr int count = (sizeof(T) + 3) / 4;
  uint words[count] = {};
  memcpy(words, &value, sizeof value);
  for (int i = 0; i < count; ++i) {
    words[i] = shuffle(words[i]);
  }
  memcpy(&value, words, sizeof value);
  return value;
}

template <class T>
MTL_INLINE T from_lane(T value, int source) {
  return by_words(value, [=](uint word) { return __shfl_sync(kAllLanes, word, source); });
}

}  // namespace mtl

namespace metal {

// ---- barriers
enum class mem_flags {
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
};
MTL_CONSTEXPR mem_flags operator|(mem_flags a, mem_flags b) {
  return mem_flags(int(a) | int(b));
}
MTL_INLINE void threadgroup_barrier(mem_flags) {
  __syncthreads();
}
MTL_INLINE void simdgroup_barrier(mem_flags) {
  __syncwarp();
}

// ---- simdgroups are warps
template <class T>
MTL_INLINE T simd_shuffle(T value, ushort source) {
  return mtl::from_lane(value, source);
}
template <class T>
MTL_INLINE T simd_broadcast(T value, ushort source) {
  return mtl::from_lane(value, source);
}
template <class T>
MTL_INLINE T simd_broadcast_first(T value) {
  return mtl::from_lane(value, 0);
}
template <class T>
MTL_INLINE T simd_shuffle_xor(T value, ushort mask) {
  return mtl::from_lane(value, mtl::lane() ^ mask);
}
// Beyond the ends a lane keeps its own value; Metal leaves it undefined.
template <class T>
MTL_INLINE T simd_shuffle_up(T value, ushort by) {
  const int source = mtl::lane() - by;
  return mtl::from_lane(value, source < 0 ? mtl::lane() : source);
}
template <class T>
MTL_INLINE T simd_shuffle_down(T value, ushort by) {
  const int source = mtl::lane() + by;
  return mtl::from_lane(value, source > 31 ? mtl::lane() : source);
}
template <class T>
MTL_INLINE T simd_shuffle_and_fill_up(T value, T fill, ushort by) {
  const int source = mtl::lane() - by;
  const T moved = mtl::from_lane(value, source & 31);
  const T filled = mtl::from_lane(fill, source & 31);
  return source < 0 ? filled : moved;
}
template <class T>
MTL_INLINE T simd_shuffle_and_fill_down(T value, T fill, ushort by) {
  const int source = mtl::lane() + by;
  const T moved = mtl::from_lane(value, source & 31);
  const T filled = mtl::from_lane(fill, source & 31);
  return source > 31 ? filled : moved;
}

#define MTL_REDUCTION(name, combined)                        \
  template <class T>                                         \
  MTL_INLINE T name(T value) {                               \
    for (int step = 1; step < 32; step *= 2) {               \
      const T a = value;                                     \
      const T b = mtl::from_lane(value, mtl::lane() ^ step); \
      value = T(combined);                                   \
    }                                                        \
    return value;                                            \
  }
MTL_REDUCTION(simd_sum, a + b)
MTL_REDUCTION(simd_product, a* b)
MTL_REDUCTION(simd_max, a < b ? b : a)
MTL_REDUCTION(simd_min, b < a ? b : a)
MTL_REDUCTION(simd_and, a& b)
MTL_REDUCTION(simd_or, a | b)
MTL_REDUCTION(simd_xor, a ^ b)
#undef MTL_REDUCTION

MTL_INLINE bool simd_any(bool value) {
  return __any_sync(mtl::kAllLanes, value);
}
MTL_INLINE bool simd_all(bool value) {
  return __all_sync(mtl::kAllLanes, value);
}

#define MTL_PREFIX(name, identity, combined)                        \
  template <class T>                                                \
  MTL_INLINE T simd_prefix_inclusive_##name(T value) {              \
    for (int step = 1; step < 32; step *= 2) {                      \
      const T a = value;                                            \
      const T b = mtl::from_lane(value, (mtl::lane() - step) & 31); \
      value = mtl::lane() >= step ? T(combined) : value;            \
    }                                                               \
    return value;                                                   \
  }                                                                 \
  template <class T>                                                \
  MTL_INLINE T simd_prefix_exclusive_##name(T value) {              \
    const T all = simd_prefix_inclusive_##name(value);              \
    const T before = mtl::from_lane(all, (mtl::lane() - 1) & 31);   \
    return mtl::lane() > 0 ? before : T(identity);                  \
  }
MTL_PREFIX(sum, 0, a + b)
MTL_PREFIX(product, 1, a* b)
#undef MTL_PREFIX

}  // namespace metal
