// Process state during a launch: signal handlers, timer, denormals. Restored after the launch.
#pragma once
#include <csignal>
#include <cstdint>
#include <ctime>
#include <memory>

namespace runtime {

// Turns faults of the kernel into findings. Other faults keep their effect.
class FaultGuard {
 public:
  FaultGuard();
  ~FaultGuard();

 private:
  std::unique_ptr<char[]> alternate_;
  stack_t old_stack_;
  struct sigaction old_[4];
};

// Ends a kernel that takes more processor time than this: it has an endless loop, or waits for a
// thread that cannot run. `entry` distinguishes the kernel's code from the runtime's.
class TimeGuard {
 public:
  TimeGuard(uint32_t seconds, void* entry);
  ~TimeGuard();

 private:
  timer_t timer_;
  struct sigaction old_;
};

// Flushes denormal floats to zero, as Apple's GPUs may do.
class DenormalGuard {
 public:
  explicit DenormalGuard(bool flush);
  ~DenormalGuard();

 private:
  uint64_t old_ = 0;
};

}  // namespace runtime
