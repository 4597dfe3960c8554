// Barriers and memory flags.
#pragma once

#include "abi.h"
#include "keywords.h"

namespace metal {

enum class mem_flags {
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
  mem_texture = 4,
};

constexpr mem_flags operator|(mem_flags a, mem_flags b) {
  return mem_flags(int(a) | int(b));
}

MTL_INLINE void threadgroup_barrier(mem_flags flags, int line = __builtin_LINE()) {
  mtl_barrier(MTL_THREADGROUP, int(flags), line);
}
MTL_INLINE void simdgroup_barrier(mem_flags flags, int line = __builtin_LINE()) {
  mtl_barrier(MTL_SIMDGROUP, int(flags), line);
}

}  // namespace metal
