// Simdgroup matrices by shuffles, as CUDA has no 8 x 8 float32 matrix instruction.
#pragma once

#include "simd.h"

namespace metal {

template <class T, int Columns = 8, int Rows = 8>
struct simdgroup_matrix {
  vec<T, 2> elements;

  MTL_INLINE simdgroup_matrix() : elements(T(0.0f)) {}
  MTL_INLINE explicit simdgroup_matrix(T diagonal) {
    for (int i = 0; i < 2; ++i) {
      elements[i] = row() == column() + i ? diagonal : T(0.0f);
    }
  }

  MTL_INLINE vec<T, 2>& thread_elements() { return elements; }
  MTL_INLINE const vec<T, 2>& thread_elements() const { return elements; }

  static MTL_INLINE int row() { return (mtl::lane() / 4 & 4) + mtl::lane() / 2 % 4; }
  static MTL_INLINE int column() { return (mtl::lane() / 4 & 2) * 2 + mtl::lane() % 2 * 2; }
  static MTL_INLINE int lane_of(int row, int column) {
    return (row & 4) * 4 + (column & 4) * 2 + (row & 3) * 2 + (column >> 1 & 1);
  }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<__half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<__nv_bfloat16, 8, 8> simdgroup_bfloat8x8;

template <class T, int Columns, int Rows = 8>
MTL_INLINE simdgroup_matrix<T, Columns, Rows> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, Columns, Rows> result;
  result.elements = vec<T, 2>(value);
  return result;
}

template <class D, class A, class B, class C>
MTL_INLINE void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d,
                                              const simdgroup_matrix<A, 8, 8>& a,
                                              const simdgroup_matrix<B, 8, 8>& b,
                                              const simdgroup_matrix<C, 8, 8>& c) {
  using M = simdgroup_matrix<D, 8, 8>;
  float sums[2] = {float(c.elements[0]), float(c.elements[1])};
  for (int k = 0; k < 8; ++k) {
    const int left = M::lane_of(M::row(), k);
    const int right = M::lane_of(k, M::column());
    const float even = mtl::from_lane(float(a.elements[0]), left);
    const float odd = mtl::from_lane(float(a.elements[1]), left);
    for (int i = 0; i < 2; ++i) {
      sums[i] += (k & 1 ? odd : even) * mtl::from_lane(float(b.elements[i]), right);
    }
  }
  d.elements[0] = D(sums[0]);
  d.elements[1] = D(sums[1]);
}
template <class D, class A, class B>
MTL_INLINE void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
                                   const simdgroup_matrix<B, 8, 8>& b) {
  simdgroup_multiply_accumulate(d, a, b, simdgroup_matrix<D, 8, 8>());
}

#define MTL_PLACE(i)                                                                   \
  (transpose ? (origin.y + M::column() + (i)) * elements_per_row + origin.x + M::row() \
             : (origin.y + M::row()) * elements_per_row + origin.x + M::column() + (i))
template <class T>
MTL_INLINE void simdgroup_load(simdgroup_matrix<T, 8, 8>& d, const T* source,
                               ulong elements_per_row = 8, vec<ulong, 2> origin = vec<ulong, 2>(0),
                               bool transpose = false) {
  using M = simdgroup_matrix<T, 8, 8>;
  for (int i = 0; i < 2; ++i) {
    d.elements[i] = source[MTL_PLACE(i)];
  }
}
template <class T>
MTL_INLINE void simdgroup_store(const simdgroup_matrix<T, 8, 8>& s, T* target,
                                ulong elements_per_row = 8, vec<ulong, 2> origin = vec<ulong, 2>(0),
                                bool transpose = false) {
  using M = simdgroup_matrix<T, 8, 8>;
  for (int i = 0; i < 2; ++i) {
    target[MTL_PLACE(i)] = s.elements[i];
  }
}
#undef MTL_PLACE

}  // namespace metal
