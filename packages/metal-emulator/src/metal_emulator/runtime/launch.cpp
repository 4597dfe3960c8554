// A launch: buffers between guard pages, the grid, and the results.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <memory>

#include "guards.h"
#include "scheduler.h"
#include "shadow.h"
#include "state.h"

namespace runtime {

State state;
void set_function_constants(const uint64_t* values);

// A buffer argument. Must match `_Buffer` in run.py.
struct Buffer {
  void* host;
  uint64_t bytes;
  uint64_t origin;  // byte that the kernel's pointer points to
  uint32_t role;
  uint32_t granule;
  const char* name;
};

struct Launch {
  void (*entry)(void**, const mtl_thread*);
  void (*set_constants)();
  const uint64_t* function_constants;  // 512 of them, or null
  const Buffer* buffers;
  uint32_t buffer_count;
  uint32_t grid[3];
  uint32_t threadgroup[3];
  uint32_t order;
  uint32_t seed;
  uint32_t checked;
  uint32_t strict;
  uint32_t flush_denormals;
  uint32_t seconds;  // processor time after which the kernel counts as an endless loop
};

namespace {

constexpr size_t kPage = 4096;
constexpr size_t kGuard = 64 << 20;  // an index that is wrong by less cannot reach another buffer

size_t whole_pages(size_t bytes) {
  return bytes == 0 ? kPage : (bytes + kPage - 1) / kPage * kPage;
}

// Copies of the buffers, placed so that an access beyond their ends faults.
class Arena {
 public:
  Arena(const Buffer* buffers, uint32_t count) : buffers_(buffers, buffers + count) {
    bytes_ = kGuard;
    for (const Buffer& buffer : buffers_) {
      bytes_ += whole_pages(buffer.bytes) + kGuard;
    }
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    memory_ = static_cast<char*>(mmap(nullptr, bytes_, PROT_NONE, flags, -1, 0));
    set_arena(memory_, memory_ + bytes_);
    char* next = memory_ + kGuard;
    for (const Buffer& buffer : buffers_) {
      place(buffer, next);
      next += whole_pages(buffer.bytes) + kGuard;
    }
  }

  ~Arena() { munmap(memory_, bytes_); }

  void** pointers() { return pointers_.data(); }

  void copy_back() {
    for (size_t i = 0; i < buffers_.size(); ++i) {
      if (!regions_[i]->read_only()) {
        memcpy(buffers_[i].host, regions_[i]->base, buffers_[i].bytes);
      }
    }
  }

  void report_unwritten() const {
    for (const Region* region : regions_) {
      size_t missing = 0;
      for (const Cell& cell : region->cells) {
        missing += !region->read_only() && !cell.initialised;
      }
      if (missing > 0) {
        report(nullptr, 0, "output '%s': %zu of %zu elements are never written", region->name,
               missing, region->cells.size());
      }
    }
  }

  void fill(Traffic* traffic) const {
    for (size_t i = 0; i < regions_.size(); ++i) {
      traffic[i] = traffic_of(*regions_[i]);
    }
  }

 private:
  // The buffer ends at the end of its pages, up to the alignment that Metal guarantees.
  void place(const Buffer& buffer, char* pages) {
    const size_t room = whole_pages(buffer.bytes);
    mprotect(pages, room, PROT_READ | PROT_WRITE);
    char* base = pages + room - (buffer.bytes + 15) / 16 * 16;
    base = buffer.bytes == 0 ? pages : base;
    memcpy(base, buffer.host, buffer.bytes);
    pointers_.push_back(base + buffer.origin);
    const Role role = static_cast<Role>(buffer.role);
    regions_.push_back(&add_region(base, buffer.bytes, role, buffer.granule, buffer.name));
  }

  std::vector<Buffer> buffers_;
  std::vector<Region*> regions_;
  std::vector<void*> pointers_;
  char* memory_;
  size_t bytes_;
};

// Fibers and their stacks are reused by later launches; there are at most 1,024.
std::vector<std::unique_ptr<Fiber>> fiber_pool;

Fiber& pooled_fiber(uint32_t index) {
  while (fiber_pool.size() <= index) {
    fiber_pool.emplace_back(new Fiber{});
    fiber_pool.back()->stack = new_stack();
  }
  return *fiber_pool[index];
}

struct Extent {
  uint32_t x, y, z;

  uint32_t total() const { return x * y * z; }
};

void set(uint32_t (&field)[3], uint32_t x, uint32_t y, uint32_t z) {
  field[0] = x;
  field[1] = y;
  field[2] = z;
}

void set(uint32_t (&field)[2], uint32_t x, uint32_t y) {
  field[0] = x;
  field[1] = y;
}

void start(Fiber& fiber, uint32_t index, const Extent& position, const Extent& size,
           const Extent& groups, const Launch& launch) {
  const uint32_t x = index % size.x;
  const uint32_t y = index / size.x % size.y;
  const uint32_t z = index / size.x / size.y;
  mtl_thread& self = fiber.self;
  set(self.position_in_group, x, y, z);
  set(self.group_position, position.x, position.y, position.z);
  set(self.position_in_grid, position.x * launch.threadgroup[0] + x,
      position.y * launch.threadgroup[1] + y, position.z * launch.threadgroup[2] + z);
  set(self.group_size, size.x, size.y, size.z);
  set(self.groups_in_grid, groups.x, groups.y, groups.z);
  set(self.grid_size, launch.grid[0], launch.grid[1], launch.grid[2]);
  self.index_in_group = index;
  self.lane = index % MTL_SIMD_WIDTH;
  self.simdgroup = index / MTL_SIMD_WIDTH;
  self.simdgroups = state.simdgroups.size();
  self.simd_width = MTL_SIMD_WIDTH;
  fiber.wait = Wait::kReady;
  fiber.exchanges = 0;
  fiber.line = 0;
  fiber.flags = 0;
  fiber.operation = "the start";
  fiber.depth = 0;
  prepare(fiber);
}

// If the grid is no multiple of the threadgroup, the last threadgroups are smaller.
void run_grid(const Launch& launch, Schedule& schedule) {
  uint32_t counts[3];
  for (int i = 0; i < 3; ++i) {
    counts[i] = (launch.grid[i] + launch.threadgroup[i] - 1) / launch.threadgroup[i];
  }
  const Extent groups = {counts[0], counts[1], counts[2]};
  std::vector<Fiber*> fibers;
  for (uint32_t number : schedule.sequence(groups.total())) {
    const Extent position = {number % groups.x, number / groups.x % groups.y,
                             number / groups.x / groups.y};
    const Extent size = {
        std::min(launch.threadgroup[0], launch.grid[0] - position.x * launch.threadgroup[0]),
        std::min(launch.threadgroup[1], launch.grid[1] - position.y * launch.threadgroup[1]),
        std::min(launch.threadgroup[2], launch.grid[2] - position.z * launch.threadgroup[2])};
    state.group = number;
    set(state.group_epoch, 1, 1);
    state.simdgroups.resize((size.total() + MTL_SIMD_WIDTH - 1) / MTL_SIMD_WIDTH);
    for (Simdgroup& simdgroup : state.simdgroups) {
      set(simdgroup.epoch, 1, 1);
      set(simdgroup.active, 0, 0);
    }
    fibers.clear();
    for (uint32_t i = 0; i < size.total(); ++i) {
      fibers.push_back(&pooled_fiber(i));
      start(*fibers.back(), i, position, size, groups, launch);
    }
    run_threadgroup(fibers, schedule);
    if (state.abandoned) {
      return;
    }
  }
}

}  // namespace

// Runs a grid. `traffic` has one entry per buffer. mtl_findings returns the findings.
extern "C" void mtl_run(const Launch* launch, Traffic* traffic, Counters* counters) {
  clear_findings();
  clear_regions();
  state.checked = launch->checked;
  state.abandoned = false;
  state.counters = {};
  Arena arena(launch->buffers, launch->buffer_count);
  if (launch->function_constants != nullptr) {
    set_function_constants(launch->function_constants);
    launch->set_constants();
  }
  kernel_entry = launch->entry;
  kernel_buffers = arena.pointers();
  Schedule schedule = {static_cast<Order>(launch->order), launch->strict != 0, {launch->seed}};
  {
    FaultGuard faults;
    TimeGuard time(launch->seconds, reinterpret_cast<void*>(launch->entry));
    DenormalGuard denormals(launch->flush_denormals != 0);
    run_grid(*launch, schedule);
  }
  if (launch->checked && !state.abandoned) {
    arena.report_unwritten();
  }
  arena.copy_back();
  arena.fill(traffic);
  *counters = state.counters;
}

}  // namespace runtime
