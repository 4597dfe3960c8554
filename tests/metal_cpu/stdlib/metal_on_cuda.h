// What a Metal kernel needs to be compiled as CUDA. Its text is the same but for threadgroup
// variables, which become __shared__, and the other address spaces, which vanish. Vectors are the
// classes of this library: CUDA's own have no operators.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "metal_cpu/signature.h"
#include "metal_cpu/vector.h"

typedef __nv_bfloat16 bfloat;
typedef __nv_bfloat16 bfloat16_t;
typedef __half float16_t;

#define float2 metal::vec<float, 2>
#define float3 metal::vec<float, 3>
#define float4 metal::vec<float, 4>
#define half2 metal::vec<__half, 2>
#define half3 metal::vec<__half, 3>
#define half4 metal::vec<__half, 4>
#define bfloat2 metal::vec<__nv_bfloat16, 2>
#define bfloat3 metal::vec<__nv_bfloat16, 3>
#define bfloat4 metal::vec<__nv_bfloat16, 4>
#define int2 metal::vec<int, 2>
#define int3 metal::vec<int, 3>
#define int4 metal::vec<int, 4>
#define uint2 metal::vec<unsigned, 2>
#define uint3 metal::vec<unsigned, 3>
#define uint4 metal::vec<unsigned, 4>
#define ushort2 metal::vec<unsigned short, 2>
#define ushort3 metal::vec<unsigned short, 3>
#define ushort4 metal::vec<unsigned short, 4>

#if !defined(INFINITY)
#define INFINITY (__int_as_float(0x7f800000))
#endif
#if !defined(NAN)
#define NAN (__int_as_float(0x7fc00000))
#endif
#define M_PI_F 3.14159265358979f
#define M_LOG2E_F 1.44269504f
#define M_LN2_F 0.69314718f

template <class T, class U>
MTL_INLINE T as_type(U value) {
  static_assert(sizeof(T) == sizeof(U), "as_type needs types of one size");
  T result;
  memcpy(&result, &value, sizeof result);
  return result;
}

namespace mtl {

constexpr unsigned kAllLanes = 0xffffffffu;

MTL_INLINE uint index_in_group() {
  return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
}
MTL_INLINE int lane() {
  return index_in_group() & 31;
}

// Any type through a shuffle of 32-bit words.
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

using ::as_type;

template <class T>
constexpr bool is_floating_point_v =
    is_same_v<T, float> || is_same_v<T, __half> || is_same_v<T, __nv_bfloat16>;

template <class T>
struct numeric_limits;
template <>
struct numeric_limits<float> {
  static MTL_CONSTEXPR float max() { return 3.402823466e+38f; }
  static MTL_CONSTEXPR float lowest() { return -3.402823466e+38f; }
  static MTL_CONSTEXPR float min() { return 1.175494351e-38f; }
  static MTL_CONSTEXPR float epsilon() { return 1.1920929e-7f; }
  static MTL_INLINE float infinity() { return INFINITY; }
};

// ---- math
#define MTL_FLOAT_FUNCTIONS                  \
  MTL_OF_X(abs, fabsf(x))                    \
  MTL_OF_X(acos, acosf(x))                   \
  MTL_OF_X(asin, asinf(x))                   \
  MTL_OF_X(atan, atanf(x))                   \
  MTL_OF_X(ceil, ceilf(x))                   \
  MTL_OF_X(cos, cosf(x))                     \
  MTL_OF_X(cosh, coshf(x))                   \
  MTL_OF_X(exp, expf(x))                     \
  MTL_OF_X(exp2, exp2f(x))                   \
  MTL_OF_X(fabs, fabsf(x))                   \
  MTL_OF_X(floor, floorf(x))                 \
  MTL_OF_X(log, logf(x))                     \
  MTL_OF_X(log2, log2f(x))                   \
  MTL_OF_X(log10, log10f(x))                 \
  MTL_OF_X(rint, rintf(x))                   \
  MTL_OF_X(round, roundf(x))                 \
  MTL_OF_X(rsqrt, 1.0f / sqrtf(x))           \
  MTL_OF_X(sin, sinf(x))                     \
  MTL_OF_X(sinh, sinhf(x))                   \
  MTL_OF_X(sqrt, sqrtf(x))                   \
  MTL_OF_X(tan, tanf(x))                     \
  MTL_OF_X(tanh, tanhf(x))                   \
  MTL_OF_X(trunc, truncf(x))                 \
  MTL_OF_X_Y(atan2, atan2f(x, y))            \
  MTL_OF_X_Y(copysign, copysignf(x, y))      \
  MTL_OF_X_Y(divide, x / y)                  \
  MTL_OF_X_Y(fmax, fmaxf(x, y))              \
  MTL_OF_X_Y(fmin, fminf(x, y))              \
  MTL_OF_X_Y(fmod, fmodf(x, y))              \
  MTL_OF_X_Y(max, fmaxf(x, y))               \
  MTL_OF_X_Y(min, fminf(x, y))               \
  MTL_OF_X_Y(pow, powf(x, y))                \
  MTL_OF_X_Y_Z(clamp, fminf(fmaxf(x, y), z)) \
  MTL_OF_X_Y_Z(fma, fmaf(x, y, z))

#define MTL_OF_X(name, value)      \
  MTL_INLINE float name(float x) { \
    return value;                  \
  }
#define MTL_OF_X_Y(name, value)             \
  MTL_INLINE float name(float x, float y) { \
    return value;                           \
  }
#define MTL_OF_X_Y_Z(name, value)                    \
  MTL_INLINE float name(float x, float y, float z) { \
    return value;                                    \
  }

namespace mtl_precise {
MTL_FLOAT_FUNCTIONS
}
using namespace mtl_precise;
namespace precise = mtl_precise;
namespace fast {
MTL_FLOAT_FUNCTIONS
}

#define MTL_OF_INTEGERS(T)                 \
  MTL_INLINE T min(T a, T b) {             \
    return b < a ? b : a;                  \
  }                                        \
  MTL_INLINE T max(T a, T b) {             \
    return a < b ? b : a;                  \
  }                                        \
  MTL_INLINE T clamp(T x, T low, T high) { \
    return min(max(x, low), high);         \
  }
MTL_OF_INTEGERS(int)
MTL_OF_INTEGERS(uint)
MTL_OF_INTEGERS(long)
MTL_OF_INTEGERS(ulong)
#undef MTL_OF_INTEGERS
using mtl_precise::clamp;
using mtl_precise::max;
using mtl_precise::min;

MTL_INLINE int abs(int x) {
  return x < 0 ? -x : x;
}
MTL_INLINE bool isnan(float x) {
  return x != x;
}
MTL_INLINE bool isinf(float x) {
  return fabsf(x) == INFINITY;
}
MTL_INLINE bool isfinite(float x) {
  return fabsf(x) < INFINITY;
}
template <class T>
MTL_INLINE T select(T otherwise, T chosen, bool condition) {
  return condition ? chosen : otherwise;
}
template <class T, int N>
MTL_INLINE T dot(vec<T, N> a, vec<T, N> b) {
  T sum = a[0] * b[0];
  for (int i = 1; i < N; ++i) {
    sum += a[i] * b[i];
  }
  return sum;
}

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
// Beyond the ends a lane keeps its own value, where Metal leaves it open.
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

// ---- atomics
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

// ---- simdgroup matrices: CUDA has no 8 x 8 float32 matrix instruction, shuffles compute the same
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

using namespace metal;

#define MLX_MTL_PRAGMA_UNROLL _Pragma("unroll")
// nvcc makes a function a host function unless it is told otherwise.
#define inline __device__ __inline__
