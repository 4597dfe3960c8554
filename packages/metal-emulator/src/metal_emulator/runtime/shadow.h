// Shadow memory: the last accesses to each element of a buffer or threadgroup variable.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "state.h"

namespace runtime {

enum class Role : uint32_t { kInput = 0, kOutput = 1, kInitialisedOutput = 2, kThreadgroup = 3 };

// The accesses to one element that can race with the next one. Epochs count barriers: an access in
// an earlier epoch is ordered before the current one. A simdgroup barrier orders the lanes of its
// simdgroup.
struct Cell {
  uint32_t writer_group;  // counted from 1; 0: not written
  uint32_t writer_epoch;
  uint32_t writer_simd_epoch;
  uint32_t reader_group;  // likewise
  uint32_t reader_epoch;
  uint32_t reader_simd_epoch;
  uint32_t reader_simdgroups;  // one bit each, in reader_epoch
  uint32_t reader_lanes;       // of the simdgroup that read last, in reader_simd_epoch
  uint32_t loads;
  uint32_t stores;
  uint16_t writer;  // index in the threadgroup
  uint8_t reader_simdgroup;
  bool initialised : 1;
  bool atomic : 1;
  bool read_by_several_groups : 1;
};

struct Region {
  char* base;
  size_t bytes;
  Role role;
  uint32_t granule;  // bytes per element
  const char* name;
  std::vector<Cell> cells;
  uint32_t used_in_group;  // threadgroup memory: the group (from 1) that declared it last

  bool read_only() const { return role == Role::kInput; }
  bool contains(const char* p) const { return p >= base && p < base + bytes; }
  Memory memory() const { return role == Role::kThreadgroup ? kThreadgroup : kDevice; }
};

// Accesses of the kernel to a buffer, counted per element.
struct Traffic {
  uint64_t loads;
  uint64_t stores;
  uint64_t elements_loaded;  // distinct elements
  uint64_t elements_stored;
  uint64_t most_loads;  // accesses to the element that was accessed most
  uint64_t most_stores;
};

void clear_regions();
Region& add_region(char* base, size_t bytes, Role role, uint32_t granule, const char* name);
Region* region_at(const char* address);
// The buffer nearest to an address outside all of them.
Region* nearest_buffer(const char* address);
// Sets the range of the guard pages between buffers: an address in it is a stray pointer.
void set_arena(char* begin, char* end);
Traffic traffic_of(const Region& region);
void report_outside(const char* address, size_t bytes, const char* verb, void* pc);

}  // namespace runtime
