// Scheduling of the threads of a threadgroup.
#pragma once
#include <cstdint>
#include <vector>

#include "state.h"

namespace runtime {

enum class Order : uint32_t { kForward = 0, kReverse = 1, kRandom = 2 };

struct Random {
  uint32_t seed;

  // Returns a number in [0, n).
  uint32_t below(uint32_t n) {
    seed = seed * 1664525u + 1013904223u;
    return static_cast<uint32_t>((static_cast<uint64_t>(seed) * n) >> 32);
  }
};

struct Schedule {
  Order order;
  bool strict;  // simdgroup operations need all lanes
  Random random;

  // Returns 0..n-1 in the order of this schedule.
  std::vector<uint32_t> sequence(uint32_t n);
};

// Runs the prepared fibers of one threadgroup to their end, or abandons the launch.
void run_threadgroup(std::vector<Fiber*>& fibers, Schedule& schedule);

}  // namespace runtime
