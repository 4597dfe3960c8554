// The causal depthwise convolution, backward: see causal_conv1d.metal for the equation and `dims`.
//
//   dx_t             = sum_j weight[K-1-j] dy_{t+j} [segment_pos_{t+j} >= j],   j = 0 .. K-1
//                      + d_new_state of x_t, where new_state holds it
//   dweight[K-1-j]   = sum_t dy_t x_{t-j} [segment_pos_t >= j]
//   dbias            = sum_t dy_t
//
// and dstate is dx at t = -(K-1) .. -1.
//
// Threads: as forward; threadgroup (32, G), G <= GROUPS. The threads of the first tokens also write
// dstate. A threadgroup adds its simdgroups' sums in order, through threadgroup memory, and writes
// them as its row of d_parameters (B, tiles, K+1, D): the taps, then the bias. No atomics.
//
// Reads x and dy (B, T, D), K - 1 of each STEPS + K - 1 a second time; writes dx once, dstate
// (B, K-1, D), and (K + 1) / (STEPS GROUPS) values per element of d_parameters.

const int length = dims[0];
const uint width = uint(dims[1]);
const uint lane = thread_index_in_simdgroup;
const uint group = simdgroup_index_in_threadgroup;
const uint groups = simdgroups_per_threadgroup;
const uint channel = thread_position_in_grid.x;
const uint row = thread_position_in_grid.z;
const int first = int(thread_position_in_grid.y) * STEPS;
// Out-of-range lanes and simdgroups clamp to the end and skip the store: all must reach the
// barrier.
const bool writes = channel < width;
const uint d = metal::min(channel, width - 1);
const ulong base = ulong(row) * ulong(length) * width + d;
const uint past = row * uint(K - 1) * width + d;
const uint positions = row * uint(dims[3]);

threadgroup float sums[(K + 1) * GROUPS * 32];

const int real = int(lengths[row * uint(dims[5])]);
const int last = metal::max(real, 1) - 1;
const long last_position = static_cast<long>(segment_pos[positions + uint(last) * uint(dims[4])]);
float taps[K];
UNROLL
for (int k = 0; k < K; ++k) {
  taps[k] = static_cast<float>(weight[d * K + k]);
}

// window[k] is x, K - 1 - k tokens before the first; g[k] is dy, k tokens after the first; reach[k]
// is how many taps of y there stay in its document, less one.
float window[STEPS + K - 1];
float g[STEPS + K - 1];
int reach[STEPS + K - 1];
UNROLL
for (int k = 0; k < K - 1; ++k) {
  const int t = metal::min(first, length - 1) + k - (K - 1);
  window[k] = t < 0 ? static_cast<float>(state[past + uint(t + K - 1) * width])
                    : static_cast<float>(x[base + ulong(t) * width]);
}
UNROLL
for (int k = 0; k < STEPS; ++k) {
  const int t = metal::min(first + k, length - 1);
  window[k + K - 1] = static_cast<float>(x[base + ulong(t) * width]);
}
UNROLL
for (int k = 0; k < STEPS + K - 1; ++k) {
  const int t = metal::min(first + k, length - 1);
  g[k] = static_cast<float>(dy[base + ulong(t) * width]);
  g[k] = first + k < length ? g[k] : 0.0f;
  const long position = static_cast<long>(segment_pos[positions + uint(t) * uint(dims[4])]);
  reach[k] = int(metal::min(position, long(K)));
}

float d_taps[K];
UNROLL
for (int k = 0; k < K; ++k) {
  d_taps[k] = 0.0f;
}
float d_bias = 0.0f;
UNROLL
for (int k = 0; k < STEPS; ++k) {
  d_bias += g[k];
  UNROLL
  for (int j = 0; j < K; ++j) {
    d_taps[K - 1 - j] += reach[k] >= j ? g[k] * window[k + K - 1 - j] : 0.0f;
  }
}

if (writes) {
  // Before the first tokens lies the state. Indices that the compiler knows keep g, reach and taps
  // in registers.
  UNROLL
  for (int k = 1 - K; k < 0; ++k) {
    float sum = 0.0f;
    UNROLL
    for (int j = -k; j < K; ++j) {
      sum += reach[k + j] >= j ? taps[K - 1 - j] * g[k + j] : 0.0f;
    }
    const int kept = k - real + K - 1;
    if (first == 0 && kept >= 0 && (real == 0 || last_position >= real - 1 - k)) {
      sum += static_cast<float>(d_new_state[past + uint(kept) * width]);
    }
    if (first == 0) {
      dstate[past + uint(k + K - 1) * width] = static_cast<T>(sum);
    }
  }
  UNROLL
  for (int k = 0; k < STEPS; ++k) {
    const int t = first + k;
    float sum = 0.0f;
    UNROLL
    for (int j = 0; j < K; ++j) {
      sum += reach[k + j] >= j ? taps[K - 1 - j] * g[k + j] : 0.0f;
    }
    const int kept = t - real + K - 1;
    if (t < real && kept >= 0 && last_position >= real - 1 - t) {
      sum += static_cast<float>(d_new_state[past + uint(kept) * width]);
    }
    if (t < length) {
      dx[base + ulong(t) * width] = static_cast<T>(sum);
    }
  }
}

UNROLL
for (int k = 0; k < K; ++k) {
  sums[(uint(k) * GROUPS + group) * 32 + lane] = d_taps[k];
}
sums[(uint(K) * GROUPS + group) * 32 + lane] = d_bias;
threadgroup_barrier(mem_flags::mem_threadgroup);
// Each simdgroup adds up some of the K + 1 rows.
for (uint k = group; k < uint(K + 1) && writes; k += groups) {
  float total = 0.0f;
  for (uint s = 0; s < groups; ++s) {
    total += sums[(k * GROUPS + s) * 32 + lane];
  }
  const uint tile = row * threadgroups_per_grid.y + threadgroup_position_in_grid.y;
  d_parameters[(tile * uint(K + 1) + k) * width + d] = total;
}
