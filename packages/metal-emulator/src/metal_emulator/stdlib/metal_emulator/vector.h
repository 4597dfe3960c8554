// Vectors of 2, 3 and 4 elements, with single components but without swizzles, which portable
// kernels do not use.
#pragma once

namespace mtl {

template <class T, int N>
struct components;

template <class T>
struct alignas(sizeof(T) * 2) components<T, 2> {
  union {
    T at[2];
    struct {
      T x, y;
    };
    struct {
      T r, g;
    };
  };
};

// As large as four elements, but the fourth must never be read or written.
template <class T>
struct alignas(sizeof(T) * 4) components<T, 3> {
  union {
    T at[3];
    struct {
      T x, y, z;
    };
    struct {
      T r, g, b;
    };
  };
};

template <class T>
struct alignas(sizeof(T) * 4) components<T, 4> {
  union {
    T at[4];
    struct {
      T x, y, z, w;
    };
    struct {
      T r, g, b, a;
    };
  };
};

}  // namespace mtl

namespace metal {

template <class T, int N>
struct vec : mtl::components<T, N> {
  vec() = default;

  template <class S, mtl::if_scalar<S> = 0>
  MTL_CONSTEXPR vec(S value) {
    for (int i = 0; i < N; ++i) {
      this->at[i] = static_cast<T>(value);
    }
  }

  template <class U, std::enable_if_t<!metal::is_same_v<U, T>, int> = 0>
  explicit MTL_CONSTEXPR vec(const vec<U, N>& other) {
    for (int i = 0; i < N; ++i) {
      this->at[i] = static_cast<T>(other.at[i]);
    }
  }

  // float4(x, y, z, w), float4(xy, zw), float4(x, yzw), ...
  template <class A, class B, class... Rest>
  MTL_CONSTEXPR vec(const A& a, const B& b, const Rest&... rest) {
    int filled = 0;
    append(filled, a);
    append(filled, b);
    (append(filled, rest), ...);
  }

  MTL_CONSTEXPR T& operator[](int i) { return this->at[i]; }
  MTL_CONSTEXPR const T& operator[](int i) const { return this->at[i]; }

#define MTL_ELEMENTWISE(op)                                          \
  friend MTL_CONSTEXPR vec operator op(const vec& a, const vec& b) { \
    vec result;                                                      \
    for (int i = 0; i < N; ++i) {                                    \
      result.at[i] = static_cast<T>(a.at[i] op b.at[i]);             \
    }                                                                \
    return result;                                                   \
  }                                                                  \
  MTL_CONSTEXPR vec& operator op##=(const vec & b) { return *this = *this op b; }
  MTL_ELEMENTWISE(+)
  MTL_ELEMENTWISE(-)
  MTL_ELEMENTWISE(*)
  MTL_ELEMENTWISE(/)
  MTL_ELEMENTWISE(%)
  MTL_ELEMENTWISE(&)
  MTL_ELEMENTWISE(|)
  MTL_ELEMENTWISE(^)
  MTL_ELEMENTWISE(<<)
  MTL_ELEMENTWISE(>>)
#undef MTL_ELEMENTWISE

#define MTL_COMPARISON(op)                                                      \
  friend MTL_CONSTEXPR vec<bool, N> operator op(const vec & a, const vec & b) { \
    vec<bool, N> result;                                                        \
    for (int i = 0; i < N; ++i) {                                               \
      result.at[i] = a.at[i] op b.at[i];                                        \
    }                                                                           \
    return result;                                                              \
  }
  MTL_COMPARISON(<)
  MTL_COMPARISON(>)
  MTL_COMPARISON(<=)
  MTL_COMPARISON(>=)
  MTL_COMPARISON(==)
  MTL_COMPARISON(!=)
#undef MTL_COMPARISON

#define MTL_UNARY(op)                                \
  MTL_CONSTEXPR vec operator op() const {            \
    vec result;                                      \
    for (int i = 0; i < N; ++i) {                    \
      result.at[i] = static_cast<T>(op this->at[i]); \
    }                                                \
    return result;                                   \
  }
  MTL_UNARY(-)
  MTL_UNARY(~)
  MTL_UNARY(!)
#undef MTL_UNARY

 private:
  template <class A>
  MTL_CONSTEXPR void append(int& filled, const A& a) {
    if constexpr (mtl::count_of<A> == 1) {
      this->at[filled++] = static_cast<T>(a);
    } else {
      for (int i = 0; i < mtl::count_of<A>; ++i) {
        this->at[filled++] = static_cast<T>(a.at[i]);
      }
    }
  }
};

}  // namespace metal

namespace mtl {
template <class T, int N>
struct element_of<metal::vec<T, N>> {
  using type = T;
  static constexpr int count = N;
};
}  // namespace mtl
