// Type traits (Metal Shading Language Specification, "Type Traits"), and those this library needs.
#pragma once

#include "words.h"

namespace metal {

using std::bool_constant;
using std::conditional;
using std::conditional_t;
using std::enable_if;
using std::enable_if_t;
using std::false_type;
using std::integral_constant;
using std::is_convertible;
using std::is_convertible_v;
using std::is_integral;
using std::is_integral_v;
using std::is_pointer;
using std::is_pointer_v;
using std::is_same;
using std::is_same_v;
using std::is_void;
using std::is_void_v;
using std::remove_const;
using std::remove_const_t;
using std::remove_cv;
using std::remove_cv_t;
using std::remove_reference;
using std::remove_reference_t;
using std::true_type;

template <class T>
using remove_addrspace_t = T;

template <class T, size_t N>
struct array {
  T elements[N];

  MTL_CONSTEXPR T& operator[](size_t i) { return elements[i]; }
  MTL_CONSTEXPR const T& operator[](size_t i) const { return elements[i]; }
  MTL_CONSTEXPR size_t size() const { return N; }
};

}  // namespace metal

namespace mtl {

// The element type and count of a vector; a scalar is its own element.
template <class T>
struct element_of {
  using type = T;
  static constexpr int count = 1;
};
template <class T>
using element_t = typename element_of<T>::type;
template <class T>
constexpr int count_of = element_of<T>::count;

template <class T>
using if_vector = std::enable_if_t<(count_of<T> > 1), int>;
template <class T>
using if_scalar = std::enable_if_t<count_of<T> == 1, int>;
template <class T>
using if_integer = std::enable_if_t<std::is_integral_v<T>, int>;

}  // namespace mtl
