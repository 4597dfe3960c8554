// The linear recurrence, backward: see linear_scan.metal for the equation and for `dims`.
//
//   dh_t = dy_t + a_{t+1} dh_{t+1},   dh_{T+1} = dh_last        the recurrence, from the end
//   dx_t = dh_t,   da_t = dh_t h_{t-1} (0 where reset_t),   dh_0 = a_1 dh_1
//
// Threads: as forward, from the last tile to the first. A tile is SEGMENT steps, unless all T steps
// are less: it begins where the forward pass has left its state in `entry`. The simdgroups exchange
// the products of their coefficients (the same ones in both directions), what their steps add to
// the state and what they add to its gradient, all behind one barrier. From x and `entry` the
// states come back with all their bits, for the bytes that reading y would cost.
//
// Reads x, a and dy (B, T, D) once, writes dx and da once, and dh0 (B, D).

const int length = dims[0];
const uint width = uint(dims[1]);
const uint lane = thread_index_in_simdgroup;
const uint split = simdgroup_index_in_threadgroup;
const uint splits = simdgroups_per_threadgroup;
const uint row = threadgroup_position_in_grid.z;
const uint channel = threadgroup_position_in_grid.x * 32 + lane;
const bool writes = channel < width;
const uint d = metal::min(channel, width - 1);
const ulong base = ulong(row) * ulong(length) * width + d;
const uint segments = uint(length + SEGMENT - 1) / SEGMENT;
const int tile = int(splits) * STEPS;

// Two sets, used in turn, as forward.
threadgroup float products[2 * SPLITS * 32];
threadgroup float partials[2 * SPLITS * 32];
threadgroup float reverses[2 * SPLITS * 32];

float after = dh_last[row * width + d];  // what the steps after the tile send to the state before
uint set = 0;
for (int start = (length - 1) / tile * tile; start >= 0; start -= tile) {
  const int first = start + int(split) * STEPS;

  float value[STEPS];
  float coefficient[STEPS];
  float g[STEPS];
  bool restart[STEPS];
  UNROLL
  for (int k = 0; k < STEPS; ++k) {
    const int t = metal::min(first + k, length - 1);
    const ulong at = base + ulong(t) * width;
    coefficient[k] = static_cast<float>(a[at]);
    value[k] = static_cast<float>(x[at]);
    g[k] = static_cast<float>(dy[at]);
    restart[k] = reset[row * uint(dims[2]) + uint(t) * uint(dims[3])];
    const bool real = first + k < length;
    coefficient[k] = real ? (restart[k] ? 0.0f : coefficient[k]) : 1.0f;
    value[k] = real ? value[k] : 0.0f;
    g[k] = real ? g[k] : 0.0f;
  }
  float h = entry[(row * segments + uint(start) / SEGMENT) * width + d];

  float all = 1.0f;
  float sum = 0.0f;
  UNROLL
  for (int k = 0; k < STEPS; ++k) {
    all *= coefficient[k];
    sum = coefficient[k] * sum + value[k];
  }
  float reverse = 0.0f;
  UNROLL
  for (int k = STEPS - 1; k >= 0; --k) {
    reverse = coefficient[k] * (g[k] + reverse);
  }

  const uint mine = set * SPLITS * 32 + lane;
  products[mine + split * 32] = all;
  partials[mine + split * 32] = sum;
  reverses[mine + split * 32] = reverse;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint s = 0; s < split; ++s) {
    h = products[mine + s * 32] * h + partials[mine + s * 32];
  }
  float sent = after;
  for (int s = int(splits) - 1; s >= 0; --s) {
    sent = s == int(split) ? after : sent;
    after = products[mine + uint(s) * 32] * after + reverses[mine + uint(s) * 32];
  }
  set = 1 - set;

  float previous[STEPS];
  UNROLL
  for (int k = 0; k < STEPS; ++k) {
    previous[k] = restart[k] ? 0.0f : h;
    h = coefficient[k] * h + value[k];
  }
  UNROLL
  for (int k = STEPS - 1; k >= 0; --k) {
    const float dh = g[k] + sent;
    sent = coefficient[k] * dh;
    if (writes && first + k < length) {
      const ulong at = base + ulong(first + k) * width;
      dx[at] = static_cast<T>(dh);
      da[at] = static_cast<A>(dh * previous[k]);
    }
  }
}
if (split == 0 && writes) {
  dh0[row * width + d] = after;
}
