// A decode step of attention: one query per sequence over the ring and its own token, one launch.
//
//   q, k = rotated(q), rotated(k)
//   o = sum_d p_d v_d / sum_d p_d,   p_d = exp(q . k_d / sqrt(D)),   0 <= d <= max_lookback
//
// d counts tokens back: d = 0 is the token itself, d >= 1 lies in slot (write_pos - d) mod slots.
// Keys carry their rotation, so the ring is read as it lies and no other slot is touched.
//
// reads   q (B, H, D), k, v (B, D) not rotated; cosine, sine (1 or B, pairs) float32;
//         ring (B, 2, slots, D) rotated keys, then values; max_lookback (1 or B); params, see below
// writes  out (B, H, D); kv (B, 2, D), for the ring's slot `write_pos`
//
// Threads. A threadgroup takes HEADS heads of one batch entry; its simdgroups share the slots,
// AHEAD at a time each, and its lanes the D channels, neighbours in neighbours. Every simdgroup
// keeps its own online softmax in float32; at the end they are merged in threadgroup memory. A slot
// is read once per threadgroup, that is H / HEADS times in all: with one head per threadgroup, the
// heads of one sequence read the ring at the same time on different cores, and memory sees it once.

constexpr int THREADS = 32 * SIMDGROUPS;
constexpr int CHANNELS = (D + 31) / 32;  // of a lane
constexpr int AHEAD = 2;                 // slots that a simdgroup loads together
constexpr bool WHOLE = D % 32 == 0;
constexpr float HIDDEN = -3.0e38f;

threadgroup float part_output[SIMDGROUPS * D];
threadgroup float part_max[SIMDGROUPS];
threadgroup float part_sum[SIMDGROUPS];

const int heads = params[0];
const int slots = params[1];
const int write_pos = params[2];  // the slot that the caller will put this token into
const int window = params[3];
const int pairs = params[4];         // channels j and j + pairs turn together
const int angle_stride = params[5];  // of a batch entry: pairs, or 0 when all share one position
const int lookback_stride = params[6];  // of a batch entry: 1, or 0 when all share one
const bool has_lookback = params[7] != 0;

const int lane = static_cast<int>(thread_index_in_simdgroup);
const int simdgroup = static_cast<int>(simdgroup_index_in_threadgroup);
const int thread_index = 32 * simdgroup + lane;
const int first_head = static_cast<int>(threadgroup_position_in_grid.x) * HEADS;
const int batch = static_cast<int>(threadgroup_position_in_grid.y);

const int limit = has_lookback ? metal::min(max_lookback[batch * lookback_stride], window) : window;
const int visible = metal::min(limit, slots);  // slots; below 0 the token does not see itself
const device T* ring_keys = ring + static_cast<size_t>(batch) * 2 * slots * D;
const device T* ring_values = ring_keys + static_cast<size_t>(slots) * D;
const device T* q_heads = q + (batch * heads + first_head) * D;
const device T* own_key = k + batch * D;
const device T* own_value = v + batch * D;

// Rotate the queries, then the key. Rotated values are rounded to T, as everywhere.
float rotated[HEADS + 1][CHANNELS];
UNROLL for (int n = 0; n <= HEADS; ++n) {
  const device T* x = n < HEADS ? q_heads + n * D : own_key;
  UNROLL for (int c = 0; c < CHANNELS; ++c) {
    const int d = lane * CHANNELS + c;
    float value = d < D ? static_cast<float>(x[d]) : 0.0f;
    if (d < 2 * pairs) {
      const bool first = d < pairs;
      const float partner = static_cast<float>(x[first ? d + pairs : d - pairs]);
      const int angle = batch * angle_stride + (first ? d : d - pairs);
      const float turned = first ? -partner * sine[angle] : partner * sine[angle];
      value = static_cast<float>(static_cast<T>(value * cosine[angle] + turned));
    }
    rotated[n][c] = value;
  }
}
if (first_head == 0 && simdgroup == 0) {
  UNROLL for (int c = 0; c < CHANNELS; ++c) {
    const int d = lane * CHANNELS + c;
    if (d < D) {
      kv[batch * 2 * D + d] = static_cast<T>(rotated[HEADS][c]);
      kv[batch * 2 * D + D + d] = own_value[d];
    }
  }
}

// The first simdgroup starts from the token itself, the others from nothing.
const float scale = metal::precise::rsqrt(static_cast<float>(D));
const bool starts = simdgroup == 0 && limit >= 0;
float largest[HEADS];
float sum[HEADS];
float output[HEADS][CHANNELS];
UNROLL for (int n = 0; n < HEADS; ++n) {
  float product = 0.0f;
  UNROLL for (int c = 0; c < CHANNELS; ++c) {
    product += rotated[n][c] * rotated[HEADS][c];
  }
  product = metal::simd_sum(product) * scale;
  largest[n] = starts ? product : HIDDEN;
  sum[n] = starts ? 1.0f : 0.0f;
  UNROLL for (int c = 0; c < CHANNELS; ++c) {
    const int d = lane * CHANNELS + c;
    output[n][c] = starts && d < D ? static_cast<float>(own_value[d]) : 0.0f;
  }
}

for (int first = simdgroup * AHEAD; first < visible; first += SIMDGROUPS * AHEAD) {
  // All loads of the round come first, so that they are under way together.
  float key[AHEAD][CHANNELS];
  float value[AHEAD][CHANNELS];
  UNROLL for (int a = 0; a < AHEAD; ++a) {
    const int back = metal::min(first + a, visible - 1) + 1;
    const int slot = write_pos - back < 0 ? write_pos - back + slots : write_pos - back;
    UNROLL for (int c = 0; c < CHANNELS; ++c) {
      const int d = lane * CHANNELS + c;
      key[a][c] = WHOLE || d < D ? static_cast<float>(ring_keys[slot * D + d]) : 0.0f;
      value[a][c] = WHOLE || d < D ? static_cast<float>(ring_values[slot * D + d]) : 0.0f;
    }
  }
  UNROLL for (int n = 0; n < HEADS; ++n) {
    float score[AHEAD];
    float new_max = largest[n];
    UNROLL for (int a = 0; a < AHEAD; ++a) {
      float product = 0.0f;
      UNROLL for (int c = 0; c < CHANNELS; ++c) {
        product += rotated[n][c] * key[a][c];
      }
      product = metal::simd_sum(product) * scale;
      score[a] = first + a < visible ? product : HIDDEN;
      new_max = metal::max(new_max, score[a]);
    }
    const float factor = metal::precise::exp(largest[n] - new_max);
    largest[n] = new_max;
    sum[n] *= factor;
    UNROLL for (int c = 0; c < CHANNELS; ++c) {
      output[n][c] *= factor;
    }
    UNROLL for (int a = 0; a < AHEAD; ++a) {
      const float weight = first + a < visible ? metal::precise::exp(score[a] - new_max) : 0.0f;
      sum[n] += weight;
      UNROLL for (int c = 0; c < CHANNELS; ++c) {
        output[n][c] += weight * value[a][c];
      }
    }
  }
}

// Merge the simdgroups' parts, one head after the other.
UNROLL for (int n = 0; n < HEADS; ++n) {
  if (lane == 0) {
    part_max[simdgroup] = largest[n];
    part_sum[simdgroup] = sum[n];
  }
  UNROLL for (int c = 0; c < CHANNELS; ++c) {
    const int d = lane * CHANNELS + c;
    if (d < D) {
      part_output[simdgroup * D + d] = output[n][c];
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float overall = HIDDEN;
  for (int s = 0; s < SIMDGROUPS; ++s) {
    overall = metal::max(overall, part_max[s]);
  }
  for (int d = thread_index; d < D; d += THREADS) {
    float total = 0.0f;
    float merged = 0.0f;
    for (int s = 0; s < SIMDGROUPS; ++s) {
      const float weight = metal::precise::exp(part_max[s] - overall);
      total += weight * part_sum[s];
      merged += weight * part_output[s * D + d];
    }
    out[(batch * heads + first_head + n) * D + d] =
        static_cast<T>(total > 0.0f ? merged / total : 0.0f);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
