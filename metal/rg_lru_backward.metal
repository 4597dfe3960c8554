// The RG-LRU over a sequence, backward: see rg_lru.metal for the equations and for `dims`.
//
//   dh_t      = dy_t + a_{t+1} dh_{t+1},    dh_{T+1} = dh_last        the recurrence, from the end
//   dx        = dh m i                      m = sqrt(1 - a^2)
//   di        = dh m x i (1 - i)            i, r: the gates behind their sigmoids
//   d log a_t = dh_t (a_t h_{t-1} - i x a_t^2 min(1 / m, 2000))
//   dr        = d log a (-8 softplus(a_param)) r (1 - r)
//   da_param  = -8 sigmoid(a_param) sum_t d log a_t r_t
//
// The bound is DeepMind's on the derivative of the square root, 1000, whose factor 2 is that of
// a^2. Where a document starts a = 0, so that nothing reaches the recurrence gate nor the state
// before; on padding dh passes through.
//
// Threads: as forward, from the last tile to the first. A tile is CHUNK steps, unless all T steps
// are less: it begins where the forward pass has left its state in `chunk_states`. The simdgroups
// exchange the products of their coefficients (the same in both directions) and their contributions
// to the state and to its gradient, all behind one barrier.
//
// Why from `chunk_states` and not from y: y would be 2 bytes per element more to read (16 in place
// of 14 + 8 / CHUNK in half precision), and has lost the state's lower bits.
//
// Reads x, both gates, dy once; writes dx, d_input_gate, d_recurrent_gate once, dh0 (B, D), and
// d_channels (B, 3, D): each sequence's share of da_param and of both gates' bias gradients.
// Each share is added up in a fixed order, by one thread in the end: no atomics.

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
const uint chunks = uint(length + CHUNK - 1) / CHUNK;
const int tile = int(splits) * STEPS;

// Two sets, used in turn, as forward.
threadgroup float products[2 * SPLITS * 32];
threadgroup float partials[2 * SPLITS * 32];
threadgroup float reverses[2 * SPLITS * 32];

const float lambda = static_cast<float>(a_param[d]);
const float rate = -8.0f * softplus(lambda);
const float bias_i = static_cast<float>(input_gate_bias[d * uint(dims[4])]);
const float bias_r = static_cast<float>(recurrent_gate_bias[d * uint(dims[4])]);
float sum_rate = 0.0f;
float sum_i = 0.0f;
float sum_r = 0.0f;
float after = dh_last[row * width + d];  // what the steps after the tile send to the state before

uint set = 0;
for (int start = (length - 1) / tile * tile; start >= 0; start -= tile) {
  const int first = start + int(split) * STEPS;

  float value[STEPS];
  float gate_i[STEPS];
  float gate_r[STEPS];
  float g[STEPS];
  int what[STEPS];
  UNROLL
  for (int k = 0; k < STEPS; ++k) {
    const int t = metal::min(first + k, length - 1);
    const ulong at = base + ulong(t) * width;
    value[k] = static_cast<float>(x[at]);
    gate_i[k] = static_cast<float>(input_gate[at]);
    gate_r[k] = static_cast<float>(recurrent_gate[at]);
    g[k] = static_cast<float>(dy[at]);
    what[k] = int(token_type[row * uint(dims[2]) + uint(t) * uint(dims[3])]);
    // Beyond the end is padding, without a gradient.
    g[k] = first + k < length ? g[k] : 0.0f;
    what[k] = first + k < length ? what[k] : 2;
  }
  float h = chunk_states[(row * chunks + uint(start) / CHUNK) * width + d];

  // From here on value, gate_i, gate_r hold x, i and r; all three are 0 on padding, which leaves
  // no gradient there.
  float a[STEPS];
  float m[STEPS];
  float all = 1.0f;
  float sum = 0.0f;
  UNROLL
  for (int k = 0; k < STEPS; ++k) {
    const float r = sigmoid(gate_r[k] + bias_r);
    const float log_a = rate * r;
    gate_r[k] = what[k] == 2 ? 0.0f : r;
    gate_i[k] = what[k] == 2 ? 0.0f : sigmoid(gate_i[k] + bias_i);
    value[k] = what[k] == 2 ? 0.0f : value[k];
    a[k] = metal::precise::exp(log_a);
    m[k] = metal::precise::sqrt(one_minus_square(log_a, a[k]));
    a[k] = what[k] == 0 ? a[k] : (what[k] == 1 ? 0.0f : 1.0f);
    m[k] = what[k] == 0 ? m[k] : 1.0f;
    all *= a[k];
    sum = a[k] * sum + m[k] * gate_i[k] * value[k];
  }
  float reverse = 0.0f;
  UNROLL
  for (int k = STEPS - 1; k >= 0; --k) {
    reverse = a[k] * (g[k] + reverse);
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
    previous[k] = h;
    h = a[k] * h + m[k] * gate_i[k] * value[k];
  }
  UNROLL
  for (int k = STEPS - 1; k >= 0; --k) {
    const float dh = g[k] + sent;
    sent = a[k] * dh;
    const float slope = metal::min(1.0f / metal::max(m[k], 1e-30f), 2000.0f);
    const float d_i = dh * m[k] * value[k] * gate_i[k] * (1.0f - gate_i[k]);
    const float d_log_a = dh * a[k] * (previous[k] - gate_i[k] * value[k] * a[k] * slope);
    const float d_r = d_log_a * rate * gate_r[k] * (1.0f - gate_r[k]);
    sum_rate += d_log_a * gate_r[k];
    sum_i += d_i;
    sum_r += d_r;
    if (writes && first + k < length) {
      const ulong at = base + ulong(first + k) * width;
      dx[at] = static_cast<T>(dh * m[k] * gate_i[k]);
      d_input_gate[at] = static_cast<G>(d_i);
      d_recurrent_gate[at] = static_cast<G>(d_r);
    }
  }
}

// The set that the last tile has not used.
const uint mine = set * SPLITS * 32 + lane;
products[mine + split * 32] = sum_rate;
partials[mine + split * 32] = sum_i;
reverses[mine + split * 32] = sum_r;
threadgroup_barrier(mem_flags::mem_threadgroup);
if (split == 0 && writes) {
  float totals[3] = {0.0f, 0.0f, 0.0f};
  for (uint s = 0; s < splits; ++s) {
    totals[0] += products[mine + s * 32];
    totals[1] += partials[mine + s * 32];
    totals[2] += reverses[mine + s * 32];
  }
  dh0[row * width + d] = after;
  const uint at = row * 3 * width + d;
  d_channels[at] = -8.0f * sigmoid(lambda) * totals[0];
  d_channels[at + width] = totals[1];
  d_channels[at + 2 * width] = totals[2];
}
