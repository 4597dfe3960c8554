// For the type check: clang's own half, bfloat and vectors. Unlike classes they can be in an
// address space.
#pragma once

typedef _Float16 half;
typedef __bf16 bfloat;

namespace metal {
template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));
}

namespace mtl {

#define MTL_ELEMENT_OF(N)                                    \
  template <class T>                                         \
  struct element_of<T __attribute__((ext_vector_type(N)))> { \
    using type = T;                                          \
    static constexpr int count = N;                          \
  };
MTL_ELEMENT_OF(2)
MTL_ELEMENT_OF(3)
MTL_ELEMENT_OF(4)
#undef MTL_ELEMENT_OF

}  // namespace mtl
