// Operations of a running kernel: exchanges within a simdgroup, barriers, atomics.
#include <algorithm>
#include <cstring>

#include "shadow.h"
#include "state.h"

namespace runtime {

// Indexed by the flags of a barrier: 1 orders device memory, 2 threadgroup memory.
static const char* const kThreadgroupBarriers[4] = {
    "threadgroup_barrier(mem_none)",
    "threadgroup_barrier(mem_device)",
    "threadgroup_barrier(mem_threadgroup)",
    "threadgroup_barrier(mem_device | mem_threadgroup)",
};
static const char* const kSimdgroupBarriers[4] = {
    "simdgroup_barrier(mem_none)",
    "simdgroup_barrier(mem_device)",
    "simdgroup_barrier(mem_threadgroup)",
    "simdgroup_barrier(mem_device | mem_threadgroup)",
};

static uint64_t function_constants[512];

void set_function_constants(const uint64_t* values) {
  memcpy(function_constants, values, sizeof function_constants);
}

extern "C" const mtl_thread* mtl_self() {
  return &state.current->self;
}

extern "C" const char* mtl_exchange(const void* value, uint32_t bytes, int line,
                                    const char* operation) {
  if (state.expired) {
    report_endless(nullptr, line);
  }
  Fiber& fiber = *state.current;
  char* slots = current_simdgroup().slots[fiber.exchanges++ & 1];
  memcpy(slots + MTL_SLOT_BYTES * fiber.self.lane, value, bytes);
  ++state.counters.exchanges;
  fiber.wait = Wait::kExchange;
  fiber.flags = 0;
  fiber.line = line;
  fiber.operation = operation;
  suspend();
  return slots;
}

extern "C" uint32_t mtl_active_lanes() {
  return current_simdgroup().active[(state.current->exchanges - 1) & 1];
}

extern "C" void mtl_barrier(int scope, int flags, int line) {
  if (state.expired) {
    report_endless(nullptr, line);
  }
  Fiber& fiber = *state.current;
  ++state.counters.barriers;
  fiber.line = line;
  fiber.flags = flags & 3;
  if (scope == MTL_THREADGROUP) {
    fiber.wait = Wait::kBarrier;
    fiber.operation = kThreadgroupBarriers[fiber.flags];
  } else {
    fiber.wait = Wait::kSimdBarrier;
    fiber.operation = kSimdgroupBarriers[fiber.flags];
  }
  suspend();
}

extern "C" uint64_t mtl_function_constant(int index) {
  return index >= 0 && index < 512 ? function_constants[index] : 0;
}

static float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

extern "C" uint32_t mtl_atomic(void* address, int operation, uint32_t value, uint32_t expected,
                               bool* done) {
  if (state.expired) {
    report_endless(__builtin_return_address(0), 0);
  }
  uint32_t* word = static_cast<uint32_t*>(address);
  if (state.checked) {
    access(word, sizeof *word, operation != MTL_LOAD, __builtin_return_address(0), true);
  }
  const uint32_t old = *word;
  const int32_t signed_old = static_cast<int32_t>(old);
  const int32_t signed_value = static_cast<int32_t>(value);
  *done = true;
  switch (operation) {
    case MTL_LOAD:
      break;
    case MTL_STORE:
    case MTL_EXCHANGE:
      *word = value;
      break;
    case MTL_ADD:
      *word = old + value;
      break;
    case MTL_SUB:
      *word = old - value;
      break;
    case MTL_MAX:
      *word = std::max(old, value);
      break;
    case MTL_MIN:
      *word = std::min(old, value);
      break;
    case MTL_AND:
      *word = old & value;
      break;
    case MTL_OR:
      *word = old | value;
      break;
    case MTL_XOR:
      *word = old ^ value;
      break;
    case MTL_COMPARE_EXCHANGE:
      *done = old == expected;
      *word = *done ? value : old;
      break;
    case MTL_ADD_FLOAT:
      *word = as_bits(as_float(old) + as_float(value));
      break;
    case MTL_MAX_SIGNED:
      *word = signed_old > signed_value ? old : value;
      break;
    case MTL_MIN_SIGNED:
      *word = signed_old < signed_value ? old : value;
      break;
    default:
      report(__builtin_return_address(0), 0, "atomic operation that Metal does not have");
  }
  return old;
}

}  // namespace runtime
