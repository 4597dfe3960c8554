// Type traits of the Metal Shading Language Specification ("Type Traits") and of this library.
#pragma once

#include "keywords.h"

namespace metal {

using std::conditional;
using std::conditional_t;
using std::enable_if;
using std::enable_if_t;
using std::false_type;
using std::integral_constant;
using std::is_convertible;
using std::is_integral;
using std::is_pointer;
using std::is_same;
using std::is_void;
using std::remove_const;
using std::remove_const_t;
using std::remove_cv;
using std::remove_cv_t;
using std::remove_reference;
using std::remove_reference_t;
using std::true_type;

// The host has these since C++17, but the type check is C++14, like Metal.
template <bool value>
using bool_constant = integral_constant<bool, value>;
template <class A, class B>
constexpr bool is_same_v = is_same<A, B>::value;
template <class From, class To>
constexpr bool is_convertible_v = is_convertible<From, To>::value;
template <class T>
constexpr bool is_integral_v = is_integral<T>::value;
template <class T>
constexpr bool is_pointer_v = is_pointer<T>::value;
template <class T>
constexpr bool is_void_v = is_void<T>::value;

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

// Element type and size of a vector; a scalar has itself as element.
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
using if_integer = std::enable_if_t<std::is_integral<T>::value, int>;

}  // namespace mtl
