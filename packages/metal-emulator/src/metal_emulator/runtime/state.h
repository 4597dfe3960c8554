// Shared state of the runtime: the running thread, the epochs that order memory, the findings. One
// launch runs at a time per process, on one OS thread. The caller holds a lock.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "abi.h"

namespace runtime {

constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kMaxThreadgroupBytes = 32768;
constexpr int kMaxCallDepth = 64;

enum class Wait { kReady, kExchange, kSimdBarrier, kBarrier, kDone };

// Kinds of memory that a barrier orders, by its flags.
enum Memory { kDevice = 0, kThreadgroup = 1 };

struct Frame {
  void* function;  // an address in the function, the same for every call
  void* caller;    // the return address
};

// A GPU thread: its stack, and the operation in which it waits.
struct Fiber {
  mtl_thread self;
  Wait wait;
  int line;               // of the current or last operation that it waits in
  int flags;              // of the barrier that it waits in: the memory that it orders
  const char* operation;  // "simd_sum", "threadgroup_barrier(mem_threadgroup)", ...
  uint32_t exchanges;
  char* stack;
  void* context;
  Frame frames[kMaxCallDepth];  // checked mode: the call stack
  int depth;
};

// 32 threads that exchange values. Two sets of slots alternate, so that a lane can publish its next
// value while other lanes still read the last one.
struct Simdgroup {
  alignas(64) char slots[2][MTL_SIMD_WIDTH * MTL_SLOT_BYTES];
  uint32_t active[2];
  uint32_t epoch[2];  // number of simdgroup barriers per kind of memory
};

struct Counters {
  uint64_t exchanges;
  uint64_t barriers;
  uint64_t accesses;
  uint64_t threadgroup_bytes;
};

struct State {
  Fiber* current;           // null outside a kernel
  bool checked;             // shadow memory is in use
  bool abandoned;           // a finding ended the launch
  volatile bool expired;    // the time limit has passed
  uint32_t group;           // index of the running threadgroup
  uint32_t group_epoch[2];  // number of threadgroup barriers per kind of memory
  std::vector<Simdgroup> simdgroups;
  Counters counters;
};

extern State state;

inline Simdgroup& current_simdgroup() {
  return state.simdgroups[state.current->self.simdgroup];
}

// ---- fibers (fiber.cpp)
void prepare(Fiber& fiber);  // to run the kernel from the start
void resume(Fiber& fiber);   // until it waits or ends
void suspend();              // called on the fiber
char* new_stack();
[[noreturn]] void report_endless(void* pc, int line);  // after `state.expired`
[[noreturn]] void abandon_launch();                    // called on the fiber, does not return
// Entry point and arguments of the kernel, set by the launch.
extern void (*kernel_entry)(void**, const mtl_thread*);
extern void** kernel_buffers;

// ---- findings (report.cpp)
void clear_findings();
// Reports a finding, once per format and address. `pc` is in the kernel's code, or null with a
// line.
[[gnu::format(printf, 3, 4)]] void report(void* pc, int line, const char* format, ...);
// Reports a finding that holds only if the two call paths differ in their source lines.
void report_if_paths_differ(const Fiber& a, const Fiber& b, int line, const char* message);

// ---- checked memory (shadow.cpp)
void access(const void* address, size_t bytes, bool write, void* pc, bool atomic = false);

}  // namespace runtime
