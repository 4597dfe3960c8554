// 8 x 8 matrices, distributed over a simdgroup: each lane holds two neighbours of one row. The
// specification leaves the layout undefined; MLX's kernels rely on this one.
#pragma once

#include "abi.h"
#include "simd.h"

namespace metal {

template <class T, int Columns = 8, int Rows = 8>
struct simdgroup_matrix {
  static_assert(Columns == 8 && Rows == 8, "a simdgroup matrix is 8 x 8");
  static_assert(is_floating_point_v<T>, "a simdgroup matrix holds floating point numbers");

  vec<T, 2> elements;

  MTL_INLINE simdgroup_matrix() : elements(T(0)) {}
  // A diagonal matrix.
  MTL_INLINE explicit simdgroup_matrix(T diagonal) {
    for (int i = 0; i < 2; ++i) {
      elements[i] = row() == column() + i ? diagonal : T(0);
    }
  }

  MTL_INLINE vec<T, 2>& thread_elements() { return elements; }
  MTL_INLINE const vec<T, 2>& thread_elements() const { return elements; }

  // Position of this lane's first element.
  static MTL_INLINE int row() {
    const int lane = mtl_self()->lane;
    return (lane / 4 & 4) + lane / 2 % 4;
  }
  static MTL_INLINE int column() {
    const int lane = mtl_self()->lane;
    return (lane / 4 & 2) * 2 + lane % 2 * 2;
  }
  static MTL_INLINE int lane_of(int row, int column) {
    return (row & 4) * 4 + (column & 4) * 2 + (row & 3) * 2 + (column >> 1 & 1);
  }
};

typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <class T, int Columns, int Rows = 8>
MTL_INLINE simdgroup_matrix<T, Columns, Rows> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, Columns, Rows> result;
  result.elements = vec<T, 2>(value);
  return result;
}

}  // namespace metal

namespace mtl {

template <class T>
using matrix = metal::simdgroup_matrix<T, 8, 8>;

template <class D, class A, class B, class C>
MTL_INLINE void multiply_accumulate(matrix<D>& d, const matrix<A>& a, const matrix<B>& b,
                                    const matrix<C>& c, int line, const char* operation) {
  struct factors {
    metal::vec<A, 2> a;
    metal::vec<B, 2> b;
  };
  const lanes<factors> all = exchange(factors{a.elements, b.elements}, line, operation);
  const int row = matrix<D>::row();
  const int column = matrix<D>::column();
  float sums[2] = {float(c.elements[0]), float(c.elements[1])};
  for (int k = 0; k < 8; ++k) {
    const float left = float(all.at(matrix<D>::lane_of(row, k)).a[k & 1]);
    const metal::vec<B, 2> right = all.at(matrix<D>::lane_of(k, column)).b;
    sums[0] += left * float(right[0]);
    sums[1] += left * float(right[1]);
  }
  d.elements[0] = D(sums[0]);
  d.elements[1] = D(sums[1]);
}

// All lanes must take part in a load or store.
MTL_INLINE void synchronize(int line, const char* operation) {
  const char nothing = 0;
  mtl_exchange(&nothing, sizeof nothing, line, operation);
}

// Position of element i of this lane in memory.
MTL_INLINE ulong place(int i, ulong elements_per_row, ulong x, ulong y, bool transpose) {
  const ulong row = matrix<float>::row();
  const ulong column = matrix<float>::column() + i;
  return x + y * elements_per_row +
         (transpose ? column * elements_per_row + row : row * elements_per_row + column);
}

}  // namespace mtl

#define MTL_MATRIX_MEMORY(space)                                                              \
  template <class T>                                                                          \
  MTL_INLINE void simdgroup_load(simdgroup_matrix<T, 8, 8>& d, const space T* source,         \
                                 ulong elements_per_row = 8, ulong2 origin = ulong2(0),       \
                                 bool transpose = false, int line = __builtin_LINE()) {       \
    mtl::synchronize(line, "simdgroup_load");                                                 \
    for (int i = 0; i < 2; ++i) {                                                             \
      d.elements[i] = source[mtl::place(i, elements_per_row, origin.x, origin.y, transpose)]; \
    }                                                                                         \
  }                                                                                           \
  template <class T>                                                                          \
  MTL_INLINE void simdgroup_store(const simdgroup_matrix<T, 8, 8>& s, space T* target,        \
                                  ulong elements_per_row = 8, ulong2 origin = ulong2(0),      \
                                  bool transpose = false, int line = __builtin_LINE()) {      \
    mtl::synchronize(line, "simdgroup_store");                                                \
    for (int i = 0; i < 2; ++i) {                                                             \
      target[mtl::place(i, elements_per_row, origin.x, origin.y, transpose)] = s.elements[i]; \
    }                                                                                         \
  }

namespace metal {

#if defined(MTL_TYPE_CHECK)
MTL_MATRIX_MEMORY(device)
MTL_MATRIX_MEMORY(threadgroup)
#else
MTL_MATRIX_MEMORY()
#endif

template <class D, class A, class B, class C>
MTL_INLINE void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d,
                                              const simdgroup_matrix<A, 8, 8>& a,
                                              const simdgroup_matrix<B, 8, 8>& b,
                                              const simdgroup_matrix<C, 8, 8>& c,
                                              int line = __builtin_LINE()) {
  mtl::multiply_accumulate(d, a, b, c, line, "simdgroup_multiply_accumulate");
}

template <class D, class A, class B>
MTL_INLINE void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
                                   const simdgroup_matrix<B, 8, 8>& b,
                                   int line = __builtin_LINE()) {
  mtl::multiply_accumulate(d, a, b, simdgroup_matrix<D, 8, 8>(), line, "simdgroup_multiply");
}

}  // namespace metal
