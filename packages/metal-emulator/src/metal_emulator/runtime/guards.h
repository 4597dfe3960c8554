// What is different in the process while a launch runs, and is put back after it.
#pragma once
#include <csignal>
#include <cstdint>
#include <ctime>
#include <memory>

namespace runtime {

// Faults of the kernel become findings. Faults of anything else stay what they are.
class FaultGuard {
 public:
  FaultGuard();
  ~FaultGuard();

 private:
  std::unique_ptr<char[]> alternate_;
  stack_t old_stack_;
  struct sigaction old_[4];
};

// A kernel that takes more processor time than this has a loop that does not end, or waits for a
// thread that cannot run: that is a finding too. `entry` tells the kernel's code from the
// runtime's.
class TimeGuard {
 public:
  TimeGuard(uint32_t seconds, void* entry);
  ~TimeGuard();

 private:
  timer_t timer_;
  struct sigaction old_;
};

// Apple's GPUs may flush denormal floats to zero; so does the processor, if asked.
class DenormalGuard {
 public:
  explicit DenormalGuard(bool flush);
  ~DenormalGuard();

 private:
  uint64_t old_ = 0;
};

}  // namespace runtime
