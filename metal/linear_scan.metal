// The linear recurrence, forward (Griffin, arXiv:2402.19427, eq. 4 without its gates).
//
//   h_t = a_t h_{t-1} + x_t,   with a_t = 0 where reset_t
//
// Threads: threadgroup (32, S), grid (ceil(D / 32), 1, B) of it. A lane is a channel. The S
// simdgroups take STEPS consecutive steps each, all together a tile, and go on to the next tile
// until the sequence ends; any length runs in this one compilation.
//   Each simdgroup runs its steps from a zero state and keeps, for every step, that partial state
// and the product of the coefficients so far. The last of both go through threadgroup memory: from
// them each simdgroup works out the state that enters its steps, and adds its share to them.
// Coefficients are only ever multiplied: 0, 1 and 1e-30 lose nothing.
//
// Reads x and a (B, T, D) once, writes y once. Also writes h_last (B, D), and entry
// (B, ceil(T / SEGMENT), D): the states before every SEGMENT steps, for the backward pass.
//
// dims: T, D, then the step of `reset` from row to row and from token to token: both 0 where one
// value holds for all.

const int length = dims[0];
const uint width = uint(dims[1]);
const uint lane = thread_index_in_simdgroup;
const uint split = simdgroup_index_in_threadgroup;
const uint splits = simdgroups_per_threadgroup;
const uint row = threadgroup_position_in_grid.z;
const uint channel = threadgroup_position_in_grid.x * 32 + lane;
// Lanes beyond the last channel follow it and write nothing.
const bool writes = channel < width;
const uint d = metal::min(channel, width - 1);
const ulong base = ulong(row) * ulong(length) * width + d;
const uint segments = uint(length + SEGMENT - 1) / SEGMENT;

// Two sets, used in turn: whoever is a tile ahead writes to the set that nobody reads any more, so
// that one barrier a tile is enough.
threadgroup float products[2 * SPLITS * 32];
threadgroup float partials[2 * SPLITS * 32];

float h = h0[row * width + d];
uint set = 0;
for (int start = 0; start < length; start += int(splits) * STEPS) {
  const int first = start + int(split) * STEPS;

  // All loads first, without a branch: they are in flight together. Beyond the end a = 1 and x = 0
  // hand the state on.
  float product[STEPS];
  float partial[STEPS];
  UNROLL
  for (int k = 0; k < STEPS; ++k) {
    const int t = metal::min(first + k, length - 1);
    product[k] = static_cast<float>(a[base + ulong(t) * width]);
    partial[k] = static_cast<float>(x[base + ulong(t) * width]);
    const bool restart = reset[row * uint(dims[2]) + uint(t) * uint(dims[3])];
    const bool real = first + k < length;
    product[k] = real ? (restart ? 0.0f : product[k]) : 1.0f;
    partial[k] = real ? partial[k] : 0.0f;
  }
  UNROLL
  for (int k = 1; k < STEPS; ++k) {
    partial[k] += product[k] * partial[k - 1];
    product[k] *= product[k - 1];
  }

  const uint mine = set * SPLITS * 32 + lane;
  products[mine + split * 32] = product[STEPS - 1];
  partials[mine + split * 32] = partial[STEPS - 1];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float entering = h;
  for (uint s = 0; s < splits; ++s) {
    entering = s == split ? h : entering;
    h = products[mine + s * 32] * h + partials[mine + s * 32];
  }
  set = 1 - set;

  if (writes) {
    if (first < length && first % SEGMENT == 0) {
      entry[(row * segments + uint(first) / SEGMENT) * width + d] = entering;
    }
    UNROLL
    for (int k = 0; k < STEPS; ++k) {
      if (first + k < length) {
        y[base + ulong(first + k) * width] = static_cast<T>(product[k] * entering + partial[k]);
      }
    }
  }
}
if (split == 0 && writes) {
  h_last[row * width + d] = h;
}
