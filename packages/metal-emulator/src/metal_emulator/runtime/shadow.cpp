#include "shadow.h"

#include <algorithm>
#include <cstring>
#include <list>

namespace runtime {

static std::list<Region> regions;  // a list, so that the address of a Region does not change
static Region* last_hit;
static char* arena_begin;
static char* arena_end;

void clear_regions() {
  regions.clear();
  last_hit = nullptr;
}

Region& add_region(char* base, size_t bytes, Role role, uint32_t granule, const char* name) {
  const size_t cells = state.checked ? (bytes + granule - 1) / granule : 0;
  regions.push_back({base, bytes, role, granule, name, std::vector<Cell>(cells), 0});
  if (role == Role::kInitialisedOutput) {
    for (Cell& cell : regions.back().cells) {
      cell.initialised = true;
    }
  }
  return regions.back();
}

Region* region_at(const char* address) {
  if (last_hit != nullptr && last_hit->contains(address)) {
    return last_hit;
  }
  for (Region& region : regions) {
    if (region.contains(address)) {
      return last_hit = &region;
    }
  }
  return nullptr;
}

Region* nearest_buffer(const char* address) {
  Region* nearest = nullptr;
  size_t best = SIZE_MAX;
  for (Region& region : regions) {
    if (region.role == Role::kThreadgroup) {
      continue;
    }
    const char* end = region.base + region.bytes;
    const size_t distance = address < region.base ? region.base - address : address - end;
    if (distance < best) {
      best = distance;
      nearest = &region;
    }
  }
  return nearest;
}

void set_arena(char* begin, char* end) {
  arena_begin = begin;
  arena_end = end;
}

Traffic traffic_of(const Region& region) {
  Traffic traffic = {};
  for (const Cell& cell : region.cells) {
    traffic.loads += cell.loads;
    traffic.stores += cell.stores;
    traffic.elements_loaded += cell.loads > 0;
    traffic.elements_stored += cell.stores > 0;
    traffic.most_loads = std::max<uint64_t>(traffic.most_loads, cell.loads);
    traffic.most_stores = std::max<uint64_t>(traffic.most_stores, cell.stores);
  }
  return traffic;
}

void report_outside(const char* address, size_t bytes, const char* verb, void* pc) {
  const Region* near = region_at(address);
  if (near == nullptr) {
    near = nearest_buffer(address);
  }
  const uint32_t* at = state.current->self.position_in_grid;
  if (near == nullptr) {
    report(pc, 0, "%s through a stray pointer, thread (%u, %u, %u)", verb, at[0], at[1], at[2]);
    return;
  }
  const bool before = address < near->base;
  const long distance = before ? near->base - address : address + bytes - near->base - near->bytes;
  report(pc, 0, "out-of-bounds %s of %zu B, %ld B %s '%s' (%zu B), thread (%u, %u, %u)", verb,
         bytes, distance, before ? "before" : "past the end of", near->name, near->bytes, at[0],
         at[1], at[2]);
}

namespace {

// The running thread, as a Cell describes it.
struct Actor {
  uint32_t group;
  uint32_t epoch;
  uint32_t simd_epoch;
  uint32_t thread;
  uint32_t simdgroup;
  uint32_t lane;
};

Actor actor_for(Memory memory) {
  const mtl_thread& self = state.current->self;
  return {state.group + 1,
          state.group_epoch[memory],
          current_simdgroup().epoch[memory],
          self.index_in_group,
          self.simdgroup,
          self.lane};
}

bool races_with_writer(const Cell& cell, const Actor& me) {
  if (cell.writer_group == 0) {
    return false;
  }
  if (cell.writer_group != me.group) {
    return true;  // threadgroups of one dispatch are not ordered
  }
  if (cell.writer == me.thread || cell.writer_epoch != me.epoch) {
    return false;
  }
  const bool same_simdgroup = cell.writer / MTL_SIMD_WIDTH == me.simdgroup;
  return !(same_simdgroup && cell.writer_simd_epoch != me.simd_epoch);
}

bool races_with_readers(const Cell& cell, const Actor& me) {
  if (cell.reader_group == 0) {
    return false;
  }
  if (cell.reader_group != me.group || cell.read_by_several_groups) {
    return true;
  }
  if (cell.reader_epoch != me.epoch) {
    return false;
  }
  if (cell.reader_simdgroups & ~(1u << me.simdgroup)) {
    return true;
  }
  return cell.reader_simd_epoch == me.simd_epoch && (cell.reader_lanes & ~(1u << me.lane)) != 0;
}

void note_read(Cell& cell, const Actor& me) {
  if (cell.reader_group != 0 && cell.reader_group != me.group) {
    cell.read_by_several_groups = true;
  }
  if (cell.reader_group != me.group || cell.reader_epoch != me.epoch) {
    cell.reader_group = me.group;
    cell.reader_epoch = me.epoch;
    cell.reader_simdgroups = 0;
    cell.reader_lanes = 0;
  }
  if (cell.reader_simdgroup != me.simdgroup || cell.reader_simd_epoch != me.simd_epoch) {
    cell.reader_simdgroup = static_cast<uint8_t>(me.simdgroup);
    cell.reader_simd_epoch = me.simd_epoch;
    cell.reader_lanes = 0;
  }
  cell.reader_simdgroups |= 1u << me.simdgroup;
  cell.reader_lanes |= 1u << me.lane;
}

void note_write(Cell& cell, const Actor& me) {
  cell.writer_group = me.group;
  cell.writer_epoch = me.epoch;
  cell.writer_simd_epoch = me.simd_epoch;
  cell.writer = static_cast<uint16_t>(me.thread);
  cell.initialised = true;
  cell.reader_group = 0;
  cell.read_by_several_groups = false;
}

const char* kind_of(const Region& region) {
  return region.role == Role::kThreadgroup ? "threadgroup" : "device";
}

void check_read(Region& region, Cell& cell, const Actor& me, void* pc) {
  if (!cell.initialised) {
    report(pc, 0, "read of uninitialised %s memory '%s'", kind_of(region), region.name);
    cell.initialised = true;
  }
  if (races_with_writer(cell, me)) {
    report(pc, 0,
           "data race on %s '%s': read of an element that another thread wrote, without a barrier",
           kind_of(region), region.name);
  }
  note_read(cell, me);
}

void check_write(Region& region, Cell& cell, const Actor& me, void* pc) {
  const bool other =
      cell.writer_group != 0 && (cell.writer_group != me.group || cell.writer != me.thread);
  if (races_with_writer(cell, me)) {
    report(pc, 0,
           "data race on %s '%s': write of an element that another thread wrote, without a barrier",
           kind_of(region), region.name);
  } else if (other && region.role != Role::kThreadgroup) {
    report(pc, 0, "output '%s': an element is written by more than one thread", region.name);
  }
  if (races_with_readers(cell, me)) {
    report(pc, 0,
           "data race on %s '%s': write of an element that another thread read, without a barrier",
           kind_of(region), region.name);
  }
  note_write(cell, me);
  cell.atomic = false;
}

}  // namespace

void access(const void* address, size_t bytes, bool write, void* pc, bool atomic) {
  const char* p = static_cast<const char*>(address);
  if (state.current == nullptr || bytes == 0) {
    return;
  }
  if (static_cast<size_t>(p - state.current->stack) < kStackBytes) {
    return;  // a private variable
  }
  if (state.expired) {
    report_endless(pc, 0);
  }
  Region* region = region_at(p);
  if (region == nullptr || p + bytes > region->base + region->bytes) {
    if (region != nullptr || (p >= arena_begin && p < arena_end)) {
      report_outside(p, bytes, write ? "write" : "read", pc);
      abandon_launch();
    }
    return;  // a constant table
  }
  ++state.counters.accesses;
  if (write && region->read_only()) {
    report(pc, 0, "write to input '%s'", region->name);
  }
  const Actor me = actor_for(region->memory());
  const size_t first = (p - region->base) / region->granule;
  const size_t last = (p + bytes - 1 - region->base) / region->granule;
  for (size_t i = first; i <= last; ++i) {
    Cell& cell = region->cells[i];
    ++(write ? cell.stores : cell.loads);
    if (region->read_only()) {
      continue;
    }
    if (atomic && (cell.atomic || cell.writer_group == 0)) {
      note_write(cell, me);  // atomic operations do not race with each other
      cell.atomic = true;
    } else if (write) {
      check_write(*region, cell, me, pc);
    } else {
      check_read(*region, cell, me, pc);
    }
  }
}

extern "C" void mtl_threadgroup_variable(void* address, size_t bytes, size_t granule,
                                         const char* name) {
  char* base = static_cast<char*>(address);
  Region* region = region_at(base);
  if (region == nullptr) {
    region = &add_region(base, bytes, Role::kThreadgroup, granule, name);
    state.counters.threadgroup_bytes += bytes;
    const size_t total = state.counters.threadgroup_bytes;
    if (total > kMaxThreadgroupBytes) {
      report(__builtin_return_address(0), 0,
             "threadgroup memory of %zu B exceeds %zu B (with '%s')", total, kMaxThreadgroupBytes,
             name);
    }
  }
  if (region->used_in_group == state.group + 1) {
    return;
  }
  // The first thread of a threadgroup: the content of the previous threadgroup is lost.
  region->used_in_group = state.group + 1;
  memset(address, 0xFF, bytes);
  std::fill(region->cells.begin(), region->cells.end(), Cell{});
}

}  // namespace runtime
