// The hooks of an instrumented kernel. With -fsanitize=thread and -fsanitize=undefined the compiler
// inserts calls to these functions at every access, function call and undefined operation. A kernel
// is linked to this runtime instead of the sanitizers' runtimes.
#include <algorithm>
#include <cstring>

#include "state.h"

using runtime::access;
using runtime::report;
using runtime::state;

#define CALLER __builtin_return_address(0)

#define READ_AND_WRITE_HOOKS(prefix, size)                \
  extern "C" void __tsan_##prefix##read##size(void* p) {  \
    access(p, size, false, CALLER);                       \
  }                                                       \
  extern "C" void __tsan_##prefix##write##size(void* p) { \
    access(p, size, true, CALLER);                        \
  }

#define HOOKS(size)                                            \
  READ_AND_WRITE_HOOKS(, size)                                 \
  READ_AND_WRITE_HOOKS(unaligned_, size)                       \
  READ_AND_WRITE_HOOKS(volatile_, size)                        \
  READ_AND_WRITE_HOOKS(unaligned_volatile_, size)              \
  extern "C" void __tsan_read_write##size(void* p) {           \
    access(p, size, false, CALLER);                            \
    access(p, size, true, CALLER);                             \
  }                                                            \
  extern "C" void __tsan_unaligned_read_write##size(void* p) { \
    access(p, size, false, CALLER);                            \
    access(p, size, true, CALLER);                             \
  }

HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)

extern "C" void __tsan_init() {
}
extern "C" void __tsan_vptr_update(void**, void*) {
}
extern "C" void __tsan_vptr_read(void**) {
}

extern "C" void __tsan_read_range(void* p, size_t bytes) {
  access(p, bytes, false, CALLER);
}

extern "C" void __tsan_write_range(void* p, size_t bytes) {
  access(p, bytes, true, CALLER);
}

extern "C" void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  access(from, bytes, false, CALLER);
  access(to, bytes, true, CALLER);
  return memcpy(to, from, bytes);
}

extern "C" void* __tsan_memmove(void* to, const void* from, size_t bytes) {
  access(from, bytes, false, CALLER);
  access(to, bytes, true, CALLER);
  return memmove(to, from, bytes);
}

extern "C" void* __tsan_memset(void* to, int value, size_t bytes) {
  access(to, bytes, true, CALLER);
  return memset(to, value, bytes);
}

// ---- calls: to find recursion, and barriers that are reached by different paths

extern "C" void __tsan_func_entry(void* caller) {
  runtime::Fiber* fiber = state.current;
  if (fiber == nullptr) {
    return;
  }
  // The return address of the hook identifies the function: it is the same for every call.
  void* function = CALLER;
  const int depth = std::min(fiber->depth, runtime::kMaxCallDepth);
  for (int i = 0; i < depth; ++i) {
    if (fiber->frames[i].function == function) {
      report(caller, 0, "recursion, which Metal does not have");
      runtime::abandon_launch();
    }
  }
  if (depth < runtime::kMaxCallDepth) {
    fiber->frames[depth] = {function, caller};
  }
  ++fiber->depth;
}

extern "C" void __tsan_func_exit() {
  if (state.current != nullptr) {
    --state.current->depth;
  }
}

// ---- undefined behaviour

namespace {

struct TypeMismatch {
  const char* file;
  uint32_t line;
  uint32_t column;
  void* type;
  unsigned char log_alignment;
  unsigned char kind;
};

void undefined(void* pc, const char* description) {
  report(pc, 0, "undefined behaviour: %s", description);
}

}  // namespace

#define UNDEFINED(handler, text)                                  \
  extern "C" void __ubsan_handle_##handler(void*, void*, void*) { \
    undefined(CALLER, text);                                      \
  }

UNDEFINED(shift_out_of_bounds, "shift by more bits than the type has")
UNDEFINED(divrem_overflow, "integer division by zero or overflow")
UNDEFINED(add_overflow, "signed overflow (+)")
UNDEFINED(sub_overflow, "signed overflow (-)")
UNDEFINED(mul_overflow, "signed overflow (*)")
UNDEFINED(negate_overflow, "signed overflow (negation)")
UNDEFINED(pointer_overflow, "pointer overflow")
UNDEFINED(load_invalid_value, "load of a bool or enum that is neither of its values")
UNDEFINED(missing_return, "end of a function without return")
UNDEFINED(vla_bound_not_positive, "array of negative size")
UNDEFINED(float_cast_overflow, "float to integer out of range")
UNDEFINED(builtin_unreachable, "unreachable code reached")

extern "C" void __ubsan_handle_out_of_bounds(void*, uintptr_t index) {
  report(CALLER, 0, "array index out of bounds (index %ld)", static_cast<long>(index));
}

extern "C" void __ubsan_handle_type_mismatch_v1(void* data, uintptr_t pointer) {
  if (pointer == 0) {
    undefined(CALLER, "null pointer");
    return;
  }
  const unsigned alignment = 1u << static_cast<TypeMismatch*>(data)->log_alignment;
  report(CALLER, 0, "pointer not aligned to %u bytes", alignment);
}
