// The RG-LRU over a sequence, forward (Griffin, arXiv:2402.19427, eq. 4 to 6).
//
//   r_t     = sigmoid(recurrent_gate_t + recurrent_gate_bias)
//   i_t     = sigmoid(input_gate_t + input_gate_bias)
//   log a_t = -8 softplus(a_param) r_t
//   h_t     = a_t h_{t-1} + sqrt(1 - a_t^2) i_t x_t
//
// A token's type: 0 as above; 1 at the start of a document, where a = 0 and the input's multiplier
// is 1; 2 on padding, where the state passes through.
//
// Threads: threadgroup (32, S), grid (ceil(D / 32), 1, B) of it. A lane is a channel. The S
// simdgroups take STEPS consecutive steps each, all together a tile, and continue with the next tile
// until the sequence ends; any length runs in this one compilation.
//   Each simdgroup runs its steps from a zero state and keeps, for every step, that partial state
// and the product of the coefficients so far. The last of both go through threadgroup memory: from
// them each simdgroup works out the state that enters its steps, and adds its share to them.
// Coefficients are only ever multiplied: 0, 1 and 1e-30 lose nothing.
//
// Reads x, both gates once, (B, T, D); writes y once: 8 bytes per element in half precision. Also
// writes h_last (B, D) and chunk_states (B, ceil(T / CHUNK), D): the states before every CHUNK
// steps, from which the backward pass starts over (4 / CHUNK bytes per element more).
//
// dims: T, D, then the step of `token_type` from sequence to sequence and from token to token, and
// of the biases from channel to channel: all 0 where one value holds for all.

const int length = dims[0];
const uint width = uint(dims[1]);
const uint lane = thread_index_in_simdgroup;
const uint split = simdgroup_index_in_threadgroup;
const uint splits = simdgroups_per_threadgroup;
const uint row = threadgroup_position_in_grid.z;
const uint channel = threadgroup_position_in_grid.x * 32 + lane;
// Out-of-range lanes clamp to the last channel and skip the store.
const bool writes = channel < width;
const uint d = metal::min(channel, width - 1);
const ulong base = ulong(row) * ulong(length) * width + d;
const uint chunks = uint(length + CHUNK - 1) / CHUNK;

// Double-buffered, so one barrier per tile suffices.
threadgroup float products[2 * SPLITS * 32];
threadgroup float partials[2 * SPLITS * 32];

const float rate = -8.0f * softplus(static_cast<float>(a_param[d]));
const float bias_i = static_cast<float>(input_gate_bias[d * uint(dims[4])]);
const float bias_r = static_cast<float>(recurrent_gate_bias[d * uint(dims[4])]);
float h = h0[row * width + d];

uint set = 0;
for (int start = 0; start < length; start += int(splits) * STEPS) {
  const int first = start + int(split) * STEPS;

  // All loads first, without a branch: they are in flight together.
  float value[STEPS];
  float gate_i[STEPS];
  float gate_r[STEPS];
  int what[STEPS];
  UNROLL
  for (int k = 0; k < STEPS; ++k) {
    const int t = metal::min(first + k, length - 1);
    const ulong at = base + ulong(t) * width;
    value[k] = static_cast<float>(x[at]);
    gate_i[k] = static_cast<float>(input_gate[at]);
    gate_r[k] = static_cast<float>(recurrent_gate[at]);
    what[k] = int(token_type[row * uint(dims[2]) + uint(t) * uint(dims[3])]);
    what[k] = first + k < length ? what[k] : 2;  // beyond the end is padding
  }

  float product[STEPS];
  float partial[STEPS];
  float all = 1.0f;
  float sum = 0.0f;
  UNROLL
  for (int k = 0; k < STEPS; ++k) {
    const float log_a = rate * sigmoid(gate_r[k] + bias_r);
    float a = metal::precise::exp(log_a);
    float multiplier = metal::precise::sqrt(one_minus_square(log_a, a));
    a = what[k] == 0 ? a : (what[k] == 1 ? 0.0f : 1.0f);
    multiplier = what[k] == 0 ? multiplier : 1.0f;
    const float v = multiplier * sigmoid(gate_i[k] + bias_i) * value[k];
    all *= a;
    sum = a * sum + (what[k] == 2 ? 0.0f : v);
    product[k] = all;
    partial[k] = sum;
  }

  const uint mine = set * SPLITS * 32 + lane;
  products[mine + split * 32] = all;
  partials[mine + split * 32] = sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float entering = h;
  for (uint s = 0; s < splits; ++s) {
    entering = s == split ? h : entering;
    h = products[mine + s * 32] * h + partials[mine + s * 32];
  }
  set = 1 - set;

  if (writes) {
    if (first < length && first % CHUNK == 0) {
      chunk_states[(row * chunks + uint(first) / CHUNK) * width + d] = entering;
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
