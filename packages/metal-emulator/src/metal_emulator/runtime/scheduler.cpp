#include "scheduler.h"

#include <algorithm>
#include <cstring>

namespace runtime {

std::vector<uint32_t> Schedule::sequence(uint32_t n) {
  std::vector<uint32_t> numbers(n);
  for (uint32_t i = 0; i < n; ++i) {
    numbers[i] = order == Order::kReverse ? n - 1 - i : i;
  }
  if (order == Order::kRandom) {
    for (uint32_t i = n; i > 1; --i) {
      std::swap(numbers[i - 1], numbers[random.below(i)]);
    }
  }
  return numbers;
}

namespace {

bool same_operation(const Fiber& a, const Fiber& b) {
  return a.line == b.line && (a.operation == b.operation || !strcmp(a.operation, b.operation));
}

// Lanes that reach a line through different calls of a helper diverge on a GPU.
bool same_calls(const Fiber& a, const Fiber& b) {
  if (a.depth != b.depth) {
    return false;
  }
  for (int i = 1; i < a.depth && i < kMaxCallDepth; ++i) {
    if (a.frames[i].caller != b.frames[i].caller) {
      return false;
    }
  }
  return true;
}

struct Group {
  std::vector<Fiber*>& fibers;
  Schedule& schedule;
  uint32_t live;

  uint32_t begin(uint32_t simdgroup) const { return simdgroup * MTL_SIMD_WIDTH; }
  uint32_t end(uint32_t simdgroup) const {
    return std::min<uint32_t>(fibers.size(), begin(simdgroup) + MTL_SIMD_WIDTH);
  }

  // Runs every lane that can run until it waits or ends.
  void run_lanes(uint32_t simdgroup) {
    const uint32_t first = begin(simdgroup);
    const uint32_t lanes = end(simdgroup) - first;
    auto run = [&](Fiber& fiber) {
      if (fiber.wait == Wait::kReady && !state.abandoned) {
        resume(fiber);
        live -= fiber.wait == Wait::kDone;
      }
    };
    if (schedule.order == Order::kRandom) {
      for (uint32_t lane : schedule.sequence(lanes)) {
        run(*fibers[first + lane]);
      }
      return;
    }
    for (uint32_t i = 0; i < lanes; ++i) {
      const uint32_t lane = schedule.order == Order::kReverse ? lanes - 1 - i : i;
      run(*fibers[first + lane]);
    }
  }

  void report_divergence(uint32_t simdgroup, const Fiber& waiting, uint32_t mask) {
    const uint32_t first = begin(simdgroup);
    const uint32_t lanes = end(simdgroup) - first;
    uint32_t lane = 0;
    while (mask >> lane & 1) {
      ++lane;
    }
    const Fiber& other = *fibers[first + lane];
    const bool ended = other.wait == Wait::kDone;
    report(nullptr, waiting.line,
           "divergent %s: reached by %d of %u lanes of simdgroup %u in threadgroup %u; lane %u "
           "%s%s%s%d",
           waiting.operation, __builtin_popcount(mask), lanes, simdgroup, state.group, lane,
           ended ? "has ended" : "waits at ", ended ? "" : other.operation,
           ended ? "; its last operation was at line " : ", line ", other.line);
  }

  // Resumes the lanes that wait in one simdgroup operation. Returns false if there are none.
  bool complete_exchange(uint32_t simdgroup) {
    const uint32_t first = begin(simdgroup);
    const uint32_t lanes = end(simdgroup) - first;
    const Fiber* waiting = nullptr;
    uint32_t mask = 0;
    for (uint32_t lane = 0; lane < lanes; ++lane) {
      const Fiber& fiber = *fibers[first + lane];
      if (fiber.wait != Wait::kExchange && fiber.wait != Wait::kSimdBarrier) {
        continue;
      }
      if (waiting == nullptr) {
        waiting = &fiber;
      }
      if (same_operation(fiber, *waiting)) {
        mask |= 1u << lane;
        if (schedule.strict && !same_calls(fiber, *waiting)) {
          report_if_paths_differ(*waiting, fiber, fiber.line,
                                 "divergent simdgroup operation: reached through different calls");
        }
      }
    }
    if (waiting == nullptr) {
      return false;
    }
    const uint32_t all = lanes == MTL_SIMD_WIDTH ? ~0u : (1u << lanes) - 1;
    if (mask != all && schedule.strict) {
      report_divergence(simdgroup, *waiting, mask);
      state.abandoned = true;
      return false;
    }
    Simdgroup& meeting = state.simdgroups[simdgroup];
    if (waiting->wait == Wait::kExchange) {
      meeting.active[(waiting->exchanges - 1) & 1] = mask;
    }
    meeting.epoch[kDevice] += waiting->flags & 1;
    meeting.epoch[kThreadgroup] += waiting->flags >> 1 & 1;
    for (uint32_t lane = 0; lane < lanes; ++lane) {
      if (mask >> lane & 1) {
        fibers[first + lane]->wait = Wait::kReady;
      }
    }
    return true;
  }

  // Resumes the threads after a barrier. All must wait at the same barrier.
  void complete_barrier() {
    const Fiber* waiting = nullptr;
    const Fiber* ended = nullptr;
    for (const Fiber* fiber : fibers) {
      if (fiber->wait == Wait::kDone) {
        ended = fiber;
        continue;
      }
      if (waiting == nullptr) {
        waiting = fiber;
      } else if (!same_operation(*fiber, *waiting)) {
        report(
            nullptr, waiting->line,
            "divergent barrier in threadgroup %u: thread %u waits at %s, thread %u at %s, line %d",
            state.group, waiting->self.index_in_group, waiting->operation,
            fiber->self.index_in_group, fiber->operation, fiber->line);
        state.abandoned = true;
        return;
      } else if (!same_calls(*fiber, *waiting)) {
        report_if_paths_differ(*waiting, *fiber, fiber->line,
                               "divergent barrier: reached through different calls");
      }
    }
    if (ended != nullptr) {
      report(nullptr, waiting->line,
             "divergent barrier in threadgroup %u: thread %u waits at %s but thread %u has ended",
             state.group, waiting->self.index_in_group, waiting->operation,
             ended->self.index_in_group);
      state.abandoned = true;
      return;
    }
    state.group_epoch[kDevice] += waiting->flags & 1;
    state.group_epoch[kThreadgroup] += waiting->flags >> 1 & 1;
    for (Fiber* fiber : fibers) {
      fiber->wait = Wait::kReady;
    }
  }
};

}  // namespace

void run_threadgroup(std::vector<Fiber*>& fibers, Schedule& schedule) {
  Group group{fibers, schedule, static_cast<uint32_t>(fibers.size())};
  while (!state.abandoned) {
    // Up to the next barrier. In random order the simdgroups also alternate between exchanges.
    std::vector<uint32_t> running = schedule.sequence(state.simdgroups.size());
    while (!running.empty()) {
      const bool any = schedule.order == Order::kRandom;
      const size_t chosen = any ? schedule.random.below(running.size()) : 0;
      group.run_lanes(running[chosen]);
      const bool goes_on = !state.abandoned && group.complete_exchange(running[chosen]);
      if (state.abandoned) {
        return;
      }
      if (!goes_on) {
        running.erase(running.begin() + chosen);
      }
    }
    if (group.live == 0) {
      return;
    }
    group.complete_barrier();
  }
}

}  // namespace runtime
