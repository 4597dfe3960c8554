// Fibers: a GPU thread that waits yields to the next one. On x86-64 a switch saves the six
// registers that a function must preserve. Elsewhere, and with MTL_UCONTEXT, ucontext switches.
#include <sys/mman.h>

#include "state.h"
#if defined(__x86_64__) && !defined(MTL_UCONTEXT)
#define MTL_OWN_SWITCH
#else
#include <ucontext.h>
#endif

namespace runtime {

void (*kernel_entry)(void**, const mtl_thread*);
void** kernel_buffers;

constexpr size_t kGuardBytes = 8192;

// The stack grows down into pages that fault, so endless recursion is detected.
char* new_stack() {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* memory = mmap(nullptr, kStackBytes + kGuardBytes, PROT_READ | PROT_WRITE, flags, -1, 0);
  mprotect(memory, kGuardBytes, PROT_NONE);
  return static_cast<char*>(memory) + kGuardBytes;
}

#if defined(MTL_OWN_SWITCH)

extern "C" void mtl_switch_stack(void** save, void* load);
asm(R"(
.text
.globl mtl_switch_stack
.hidden mtl_switch_stack
.type mtl_switch_stack,@function
mtl_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size mtl_switch_stack,.-mtl_switch_stack
)");

static void* scheduler_context;

static void run_kernel() {
  kernel_entry(kernel_buffers, &state.current->self);
  state.current->wait = Wait::kDone;
  mtl_switch_stack(&state.current->context, scheduler_context);
  __builtin_unreachable();
}

void prepare(Fiber& fiber) {
  // Spread the lanes over the cache sets: equal offsets in 256 KB stacks would collide.
  char* top = fiber.stack + kStackBytes - (fiber.self.index_in_group & 63) * 320;
  void** stack = reinterpret_cast<void**>(top);
  *--stack = nullptr;  // the return address of run_kernel, which never returns; aligns the stack
  *--stack = reinterpret_cast<void*>(run_kernel);
  for (int saved = 0; saved < 6; ++saved) {
    *--stack = nullptr;
  }
  fiber.context = stack;
}

void resume(Fiber& fiber) {
  state.current = &fiber;
  mtl_switch_stack(&scheduler_context, fiber.context);
  state.current = nullptr;
}

void suspend() {
  mtl_switch_stack(&state.current->context, scheduler_context);
}

#else

static ucontext_t scheduler_context;

static void run_kernel() {
  kernel_entry(kernel_buffers, &state.current->self);
  state.current->wait = Wait::kDone;
  swapcontext(static_cast<ucontext_t*>(state.current->context), &scheduler_context);
}

void prepare(Fiber& fiber) {
  if (fiber.context == nullptr) {
    fiber.context = new ucontext_t;
  }
  ucontext_t* context = static_cast<ucontext_t*>(fiber.context);
  getcontext(context);
  context->uc_stack.ss_sp = fiber.stack;
  context->uc_stack.ss_size = kStackBytes;
  context->uc_link = nullptr;
  makecontext(context, run_kernel, 0);
}

void resume(Fiber& fiber) {
  state.current = &fiber;
  swapcontext(&scheduler_context, static_cast<ucontext_t*>(fiber.context));
  state.current = nullptr;
}

void suspend() {
  swapcontext(static_cast<ucontext_t*>(state.current->context), &scheduler_context);
}

#endif

void abandon_launch() {
  state.abandoned = true;
  suspend();
  __builtin_unreachable();
}

}  // namespace runtime
