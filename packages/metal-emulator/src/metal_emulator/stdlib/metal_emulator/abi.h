// The binary interface between a compiled kernel and the runtime, with C types only. Both sides
// include it, and are compiled with different flags and possibly different compilers.
#pragma once
#include <stddef.h>
#include <stdint.h>

// The position of a GPU thread in the grid, set by the runtime.
struct mtl_thread {
  uint32_t position_in_grid[3];
  uint32_t position_in_group[3];
  uint32_t group_position[3];
  uint32_t group_size[3];
  uint32_t groups_in_grid[3];
  uint32_t grid_size[3];
  uint32_t index_in_group;
  uint32_t lane;
  uint32_t simdgroup;
  uint32_t simdgroups;
  uint32_t simd_width;
};

enum mtl_scope { MTL_THREADGROUP = 0, MTL_SIMDGROUP = 1 };

enum mtl_atomic_op {
  MTL_LOAD,
  MTL_STORE,
  MTL_EXCHANGE,
  MTL_ADD,
  MTL_SUB,
  MTL_MAX,
  MTL_MIN,
  MTL_AND,
  MTL_OR,
  MTL_XOR,
  MTL_COMPARE_EXCHANGE,
  MTL_ADD_FLOAT,
  MTL_MAX_SIGNED,
  MTL_MIN_SIGNED,
};

enum { MTL_SIMD_WIDTH = 32, MTL_SLOT_BYTES = 64 };

extern "C" {
// Returns the running thread.
const mtl_thread* mtl_self();
// Publishes `bytes` (at most MTL_SLOT_BYTES) to the simdgroup, waits until all its lanes have done
// the same, and returns the lanes' values: 32 slots of MTL_SLOT_BYTES.
const char* mtl_exchange(const void* value, uint32_t bytes, int line, const char* operation);
// Returns one bit per lane that took part in the last exchange.
uint32_t mtl_active_lanes();
// `flags` are those of metal::mem_flags.
void mtl_barrier(int scope, int flags, int line);
// Registers a threadgroup variable at its declaration; `granule` is the size of its scalars.
void mtl_threadgroup_variable(void* address, size_t bytes, size_t granule, const char* name);
// Applies an atomic operation to the 32-bit word at `address` and returns the old value. `done` is
// false only if a compare-exchange finds another value.
uint32_t mtl_atomic(void* address, int operation, uint32_t value, uint32_t expected, bool* done);
// Returns the bits of function constant `index`.
uint64_t mtl_function_constant(int index);
}
