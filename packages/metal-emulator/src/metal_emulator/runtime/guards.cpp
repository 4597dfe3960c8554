#include "guards.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "shadow.h"
#include "state.h"

namespace runtime {

namespace {

constexpr int kFaults[4] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
constexpr int kTimer = SIGVTALRM;
constexpr ptrdiff_t kStackGuard = 8192;
constexpr int kGraceMilliseconds = 50;

pthread_t owner;
void* kernel_library;
uint32_t limit;
int strikes;

// The address after the instruction, like a return address: lines are looked up just before it.
void* program_counter(void* context) {
#if defined(__x86_64__)
  return reinterpret_cast<void*>(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP] + 1);
#elif defined(__aarch64__)
  return reinterpret_cast<void*>(static_cast<ucontext_t*>(context)->uc_mcontext.pc + 1);
#else
  return nullptr;
#endif
}

void* library_of(void* pc) {
  Dl_info info;
  return dladdr(pc, &info) ? info.dli_fbase : nullptr;
}

bool in_kernel_thread() {
  return state.current != nullptr && pthread_equal(owner, pthread_self());
}

void on_fault(int number, siginfo_t* info, void* context) {
  if (!in_kernel_thread()) {
    signal(number, SIG_DFL);  // not a fault of the kernel: it recurs and ends the process
    return;
  }
  void* pc = program_counter(context);
  const char* address = static_cast<char*>(info->si_addr);
  const char* stack = state.current->stack;
  if (number == SIGFPE) {
    report(pc, 0, "integer division by zero");
  } else if (number == SIGILL) {
    report(pc, 0, "undefined behaviour reached");
  } else if (address < stack && address >= stack - kStackGuard) {
    report(nullptr, 0, "stack overflow: endless recursion or huge private arrays");
  } else {
    report_outside(address, 1, "access", pc);
  }
  abandon_launch();
}

void on_timer(int, siginfo_t*, void* context) {
  if (!state.expired) {
    strikes = 0;
    state.expired = true;  // the next access, exchange or barrier of the kernel ends it
  }
  // A loop without any of these ends here, but only within the kernel's own code: the runtime must
  // not be interrupted.
  void* pc = program_counter(context);
  if (++strikes > kGraceMilliseconds && in_kernel_thread() && library_of(pc) == kernel_library) {
    report_endless(pc, 0);
  }
}

}  // namespace

void report_endless(void* pc, int line) {
  report(pc, line, "still running after %u s of processor time: an endless loop?", limit);
  abandon_launch();
}

FaultGuard::FaultGuard() : alternate_(new char[kStackBytes]) {
  owner = pthread_self();
  stack_t stack = {};
  stack.ss_sp = alternate_.get();
  stack.ss_size = kStackBytes;
  sigaltstack(&stack, &old_stack_);
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  for (int i = 0; i < 4; ++i) {
    sigaction(kFaults[i], &action, &old_[i]);
  }
}

FaultGuard::~FaultGuard() {
  for (int i = 0; i < 4; ++i) {
    sigaction(kFaults[i], &old_[i], nullptr);
  }
  sigaltstack(&old_stack_, nullptr);
}

TimeGuard::TimeGuard(uint32_t seconds, void* entry) {
  kernel_library = library_of(entry);
  state.expired = false;
  limit = seconds;
  struct sigaction action = {};
  action.sa_sigaction = on_timer;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER | SA_RESTART;
  sigaction(kTimer, &action, &old_);
  sigevent event = {};
  event.sigev_notify = SIGEV_THREAD_ID;
  event.sigev_signo = kTimer;
#if defined(sigev_notify_thread_id)
  event.sigev_notify_thread_id = static_cast<int>(syscall(SYS_gettid));
#else
  event._sigev_un._tid = static_cast<int>(syscall(SYS_gettid));
#endif
  timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &timer_);
  itimerspec times = {};
  times.it_value.tv_sec = seconds;
  times.it_interval.tv_nsec = 1000000;
  timer_settime(timer_, 0, &times, nullptr);
}

TimeGuard::~TimeGuard() {
  timer_delete(timer_);
  sigaction(kTimer, &old_, nullptr);
}

DenormalGuard::DenormalGuard(bool flush) {
#if defined(__x86_64__)
  old_ = _mm_getcsr();
  if (flush) {
    _mm_setcsr(static_cast<unsigned>(old_) | 0x8040);
  }
#elif defined(__aarch64__)
  asm volatile("mrs %0, fpcr" : "=r"(old_));
  if (flush) {
    asm volatile("msr fpcr, %0" ::"r"(old_ | (1ull << 24)));
  }
#endif
}

DenormalGuard::~DenormalGuard() {
#if defined(__x86_64__)
  _mm_setcsr(static_cast<unsigned>(old_));
#elif defined(__aarch64__)
  asm volatile("msr fpcr, %0" ::"r"(old_));
#endif
}

}  // namespace runtime
