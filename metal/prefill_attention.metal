// Attention of a chunk of queries over the last `window` tokens, one key/value head for all heads.
//
//   o_i = sum_j p_ij v_j / sum_j p_ij,   p_ij = exp(q_i . k_j / sqrt(D)),  0 <= i - j <= lookback_i
//
// i and j count tokens from the chunk's start. Keys j >= 0 lie in the chunk, keys j < 0 in the
// ring, in slot (write_pos + j) mod slots: they are read where they lie, wherever the ring wraps.
//
// reads   q (B, L, H, D) rotated; kv (B, 2, L, D) the chunk's rotated keys, then its values;
//         ring (B, 2, slots, D) likewise; max_lookback (1 or B, L); params, see below
// writes  out (B, L, H, D)
//
// Threads. The H heads share their keys, so a row of the work is one (token, head): row i H + h.
// A threadgroup takes ROWS rows of one batch entry and walks over the keys that any of them can
// see, KEYS at a time, and over no other. Per block of keys:
//   1. scores, transposed: a simdgroup takes 8 keys, straight from memory, against all rows;
//   2. online softmax in float32: THREADS / ROWS threads share a row;
//   3. output: a simdgroup takes a slice of the head, straight from memory, for all rows.
// So each key and value is read once per threadgroup, and only the queries and one block of scores
// lie in threadgroup memory: what is held does not grow with L.
//
// Products are 8 x 8 simdgroup matrices of float32. A lane holds two neighbours of one row:
// (matrix_row, matrix_column) and (matrix_row, matrix_column + 1), as in MLX's own kernels.

constexpr int THREADS = 32 * SIMDGROUPS;
constexpr int ROW_TILES = ROWS / 8;
constexpr int HEAD_TILES = (D + 7) / 8;
constexpr int SLICE = (HEAD_TILES + SIMDGROUPS - 1) / SIMDGROUPS;  // head tiles of a simdgroup
constexpr int KEY_TILES = KEYS / (8 * SIMDGROUPS);                 // key tiles of a simdgroup
constexpr int SHARE = THREADS / ROWS;                              // threads of a softmax row
constexpr int Q_STRIDE = 8 * HEAD_TILES + 8;                       // padded against bank conflicts
constexpr int S_STRIDE = KEYS + 8;
constexpr bool WHOLE = D % 8 == 0;
constexpr float HIDDEN = -3.0e38f;

threadgroup T queries[ROWS * Q_STRIDE];
threadgroup float scores[ROWS * S_STRIDE];
threadgroup float row_factor[ROWS];

const int length = params[0];
const int heads = params[1];
const int slots = params[2];
const int write_pos = params[3];  // the slot after the newest token's
const int window = params[4];
const int lookback_stride = params[5];  // of a batch entry: L, or 0 when all share one row
const bool has_lookback = params[6] != 0;

const int lane = static_cast<int>(thread_index_in_simdgroup);
const int simdgroup = static_cast<int>(simdgroup_index_in_threadgroup);
const int thread_index = 32 * simdgroup + lane;
const int matrix_row = ((lane / 4) & 4) + (lane / 2) % 4;
const int matrix_column = ((lane / 4) & 2) * 2 + (lane % 2) * 2;

const int batch = static_cast<int>(threadgroup_position_in_grid.y);
const int first_row = static_cast<int>(threadgroup_position_in_grid.x) * ROWS;
const int end_row = metal::min(first_row + ROWS, length * heads);

const device T* q_rows = q + (static_cast<size_t>(batch) * length * heads + first_row) * D;
const device T* chunk_keys = kv + static_cast<size_t>(batch) * 2 * length * D;
const device T* chunk_values = chunk_keys + static_cast<size_t>(length) * D;
const device T* ring_keys = ring + static_cast<size_t>(batch) * 2 * slots * D;
const device T* ring_values = ring_keys + static_cast<size_t>(slots) * D;

for (int n = thread_index; n < ROWS * 8 * HEAD_TILES; n += THREADS) {
  const int row = n / (8 * HEAD_TILES);
  const int d = n % (8 * HEAD_TILES);
  const bool real = first_row + row < end_row && d < D;
  queries[row * Q_STRIDE + d] = real ? q_rows[row * D + d] : static_cast<T>(0.0f);
}

// The band of the softmax row that this thread shares: it sees the keys oldest .. token.
const int my_row = thread_index / SHARE;
const int my_part = thread_index % SHARE;
const bool my_row_real = first_row + my_row < end_row;
const int token = (first_row + my_row) / heads;
int oldest = length;  // sees nothing
if (my_row_real) {
  const int lookback_of_token =
      has_lookback ? max_lookback[batch * lookback_stride + token] : window;
  oldest = metal::max(token - metal::min(lookback_of_token, window), -slots);
}

// The keys that the threadgroup's rows see: first_key .. last_key. Every simdgroup works it out.
const int lane_row = metal::min(first_row + lane % ROWS, end_row - 1);
const int lane_token = lane_row / heads;
const int lane_lookback =
    has_lookback ? max_lookback[batch * lookback_stride + lane_token] : window;
const int lane_oldest = metal::max(lane_token - metal::min(lane_lookback, window), -slots);
const int first_key = metal::simd_min(lane_oldest);
const int last_key = (end_row - 1) / heads;

const float scale = metal::precise::rsqrt(static_cast<float>(D));
float running_max = HIDDEN;
float running_sum = 0.0f;
metal::simdgroup_matrix<float, 8, 8> output[SLICE][ROW_TILES];
UNROLL for (int c = 0; c < SLICE; ++c) {
  UNROLL for (int r = 0; r < ROW_TILES; ++r) {
    output[c][r] = metal::make_filled_simdgroup_matrix<float, 8>(0.0f);
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

for (int first = first_key; first <= last_key; first += KEYS) {
  // 1. Scores of this simdgroup's keys, one matrix row per key.
  metal::simdgroup_matrix<float, 8, 8> product[KEY_TILES][ROW_TILES];
  UNROLL for (int t = 0; t < KEY_TILES; ++t) {
    UNROLL for (int r = 0; r < ROW_TILES; ++r) {
      product[t][r] = metal::make_filled_simdgroup_matrix<float, 8>(0.0f);
    }
    const int column = 8 * (simdgroup * KEY_TILES + t);
    if (first + column <= last_key) {
      // Beyond the band it is the last key again, which the softmax masks.
      const int key = metal::min(first + column + matrix_row, last_key);
      const int slot = write_pos + key < 0 ? write_pos + key + slots : write_pos + key;
      const device T* key_data =
          key < 0 ? ring_keys + slot * D : chunk_keys + static_cast<size_t>(key) * D;
      for (int h = 0; h < HEAD_TILES; ++h) {
        const int d = 8 * h + matrix_column;
        metal::simdgroup_matrix<float, 8, 8> k_tile;
        k_tile.thread_elements()[0] = WHOLE || d < D ? static_cast<float>(key_data[d]) : 0.0f;
        k_tile.thread_elements()[1] =
            WHOLE || d + 1 < D ? static_cast<float>(key_data[d + 1]) : 0.0f;
        UNROLL for (int r = 0; r < ROW_TILES; ++r) {
          const int at = (8 * r + matrix_column) * Q_STRIDE + 8 * h + matrix_row;
          metal::simdgroup_matrix<float, 8, 8> q_tile;  // transposed: a column is a row of the work
          q_tile.thread_elements()[0] = static_cast<float>(queries[at]);
          q_tile.thread_elements()[1] = static_cast<float>(queries[at + Q_STRIDE]);
          metal::simdgroup_multiply_accumulate(product[t][r], k_tile, q_tile, product[t][r]);
        }
      }
    }
  }
  // All simdgroups have used the previous block.
  threadgroup_barrier(mem_flags::mem_threadgroup);
  UNROLL for (int t = 0; t < KEY_TILES; ++t) {
    UNROLL for (int r = 0; r < ROW_TILES; ++r) {
      const int column = 8 * (simdgroup * KEY_TILES + t) + matrix_row;
      const int at = (8 * r + matrix_column) * S_STRIDE + column;
      scores[at] = product[t][r].thread_elements()[0];
      scores[at + S_STRIDE] = product[t][r].thread_elements()[1];
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // 2. Online softmax: scores become weights relative to the largest score so far.
  float score[KEYS / SHARE];
  float block_max = HIDDEN;
  UNROLL for (int n = 0; n < KEYS / SHARE; ++n) {
    const int column = my_part + n * SHARE;
    const int key = first + column;
    const bool visible = key >= oldest && key <= token;
    score[n] = visible ? scores[my_row * S_STRIDE + column] * scale : HIDDEN;
    block_max = metal::max(block_max, score[n]);
  }
  for (int step = 1; step < SHARE; step *= 2) {
    block_max = metal::max(block_max, metal::simd_shuffle_xor(block_max, step));
  }
  const float new_max = metal::max(running_max, block_max);
  float block_sum = 0.0f;
  UNROLL for (int n = 0; n < KEYS / SHARE; ++n) {
    const float weight = score[n] == HIDDEN ? 0.0f : metal::precise::exp(score[n] - new_max);
    scores[my_row * S_STRIDE + my_part + n * SHARE] = weight;
    block_sum += weight;
  }
  for (int step = 1; step < SHARE; step *= 2) {
    block_sum += metal::simd_shuffle_xor(block_sum, step);
  }
  const float factor = metal::precise::exp(running_max - new_max);
  running_sum = running_sum * factor + block_sum;
  running_max = new_max;
  if (my_part == 0) {
    row_factor[my_row] = factor;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // 3. The simdgroup's slice of the output: rescale, then add weights x values.
  UNROLL for (int r = 0; r < ROW_TILES; ++r) {
    const float rescale = row_factor[8 * r + matrix_row];
    UNROLL for (int c = 0; c < SLICE; ++c) {
      output[c][r].thread_elements()[0] *= rescale;
      output[c][r].thread_elements()[1] *= rescale;
    }
  }
  const int tiles = (metal::min(KEYS, last_key - first + 1) + 7) / 8;
  for (int t = 0; t < tiles; ++t) {
    metal::simdgroup_matrix<float, 8, 8> weights[ROW_TILES];
    UNROLL for (int r = 0; r < ROW_TILES; ++r) {
      const int at = (8 * r + matrix_row) * S_STRIDE + 8 * t + matrix_column;
      weights[r].thread_elements()[0] = scores[at];
      weights[r].thread_elements()[1] = scores[at + 1];
    }
    const int key = metal::min(first + 8 * t + matrix_row, last_key);
    const int slot = write_pos + key < 0 ? write_pos + key + slots : write_pos + key;
    const device T* value_data =
        key < 0 ? ring_values + slot * D : chunk_values + static_cast<size_t>(key) * D;
    UNROLL for (int c = 0; c < SLICE; ++c) {
      const int tile = simdgroup * SLICE + c;
      if (tile < HEAD_TILES) {
        const int d = 8 * tile + matrix_column;
        metal::simdgroup_matrix<float, 8, 8> v_tile;
        v_tile.thread_elements()[0] = WHOLE || d < D ? static_cast<float>(value_data[d]) : 0.0f;
        v_tile.thread_elements()[1] =
            WHOLE || d + 1 < D ? static_cast<float>(value_data[d + 1]) : 0.0f;
        UNROLL for (int r = 0; r < ROW_TILES; ++r) {
          metal::simdgroup_multiply_accumulate(output[c][r], weights[r], v_tile, output[c][r]);
        }
      }
    }
  }
}

threadgroup_barrier(mem_flags::mem_threadgroup);
if (my_part == 0) {
  row_factor[my_row] = running_sum > 0.0f ? 1.0f / running_sum : 0.0f;
}
threadgroup_barrier(mem_flags::mem_threadgroup);

device T* out_rows = out + (static_cast<size_t>(batch) * length * heads + first_row) * D;
UNROLL for (int r = 0; r < ROW_TILES; ++r) {
  const int row = 8 * r + matrix_row;
  const float normalize = row_factor[row];
  UNROLL for (int c = 0; c < SLICE; ++c) {
    const int d = 8 * (simdgroup * SLICE + c) + matrix_column;
    if (first_row + row < end_row && d < D) {
      out_rows[row * D + d] =
          static_cast<T>(output[c][r].thread_elements()[0] * normalize);
      if (d + 1 < D) {
        out_rows[row * D + d + 1] =
            static_cast<T>(output[c][r].thread_elements()[1] * normalize);
      }
    }
  }
}
