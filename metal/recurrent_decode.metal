// A decode step of the recurrent block between its projections (Griffin, arXiv:2402.19427, fig. 2):
// convolution, both gates, RG-LRU and the gated branch, for up to ROWS tokens.
//
//   x_t   = conv_bias + sum_j conv_weight[TAPS-1-j] x_branch_{t-j}
//   r     = sigmoid(x_t @ recurrent_weight + recurrent_bias)
//   i     = sigmoid(x_t @ input_weight + input_bias)
//   log a = -8 softplus(a_param) r
//   h_t   = a h_{t-1} + sqrt(1 - a^2) i x_t
//   out_t = gelu(y_branch_t) h_t
//
// The gates' matrices have one block of BLOCK x BLOCK per head. A token's type: 0 as above; 1 at
// the start of a document, where a = 0, the input's multiplier is 1 and no tap reaches back; 2 on
// padding, where the states pass through.
//
// reads   y_branch, x_branch (B, steps, D); conv_weight (D, TAPS); conv_bias, a_param (D);
//         conv_state (B, TAPS-1, D); both weights (heads, BLOCK, BLOCK), biases (heads, BLOCK);
//         h0 (B, D) float32; token_type (B, steps) or one for all; params, see below
// writes  out (B, steps, D); new_conv_state (B, TAPS-1, D); h (B, D) float32
//
// Threads. A threadgroup computes COLUMNS channels of one head, for `entries` batch entries at
// once: ROWS tokens or fewer. The work is reading the gates' weights, 2 BLOCK COLUMNS values: each
// simdgroup takes some of the weights' rows, its lanes neighbouring columns, and each weight serves
// all the tokens. The input of the gates is a whole block of channels; each threadgroup of a head
// computes it anew, which is BLOCK TAPS values and saves a launch.
//   1. convolution, one channel of one batch entry per thread; rounded to T as the model does;
//   2. partial products of every simdgroup, added up in threadgroup memory;
//   3. recurrence and output, one channel of one batch entry per thread.

constexpr int THREADS = 32 * SIMDGROUPS;
constexpr int COLUMNS = 32 * WIDE;
constexpr int TILES = (BLOCK + COLUMNS - 1) / COLUMNS;
constexpr int MEMORY = TAPS - 1;
constexpr int AHEAD = 4;  // rows of the weights loaded together
constexpr int SHARE = AHEAD * ((BLOCK + AHEAD * SIMDGROUPS - 1) / (AHEAD * SIMDGROUPS));
constexpr bool WHOLE = SHARE * SIMDGROUPS == BLOCK && TILES * COLUMNS == BLOCK;

threadgroup float inputs[ROWS * BLOCK];
threadgroup float parts[SIMDGROUPS * 2 * COLUMNS];
threadgroup float gates[ROWS * 2 * COLUMNS];

const int batch_size = params[0];
const int steps = params[1];
const int width = params[2];        // D
const int entries = params[3];      // batch entries of a threadgroup: entries * steps <= ROWS
const int type_row = params[4];     // from batch entry to batch entry: steps, or 0
const int type_step = params[5];    // from step to step: 1, or 0

const int lane = static_cast<int>(thread_index_in_simdgroup);
const int simdgroup = static_cast<int>(simdgroup_index_in_threadgroup);
const int thread_index = 32 * simdgroup + lane;
const int first_channel = static_cast<int>(threadgroup_position_in_grid.x) / TILES * BLOCK;
const int first_column = static_cast<int>(threadgroup_position_in_grid.x) % TILES * COLUMNS;
const int first_entry = static_cast<int>(threadgroup_position_in_grid.y) * entries;

// 1. Convolution.
for (int n = thread_index; n < entries * BLOCK; n += THREADS) {
  const int row = n / BLOCK * steps;
  const int i = n % BLOCK;
  const int entry = first_entry + n / BLOCK;
  const int d = first_channel + i;
  if (entry < batch_size) {
    float tap[TAPS];
    float past[MEMORY];  // oldest first
    UNROLL for (int j = 0; j < TAPS; ++j) {
      tap[j] = static_cast<float>(conv_weight[d * TAPS + j]);
    }
    UNROLL for (int j = 0; j < MEMORY; ++j) {
      past[j] = static_cast<float>(
          static_cast<T>(conv_state[(entry * MEMORY + j) * width + d]));
    }
    for (int t = 0; t < steps; ++t) {
      const int what = static_cast<int>(token_type[entry * type_row + t * type_step]);
      const float now = static_cast<float>(x_branch[(entry * steps + t) * width + d]);
      float sum = static_cast<float>(conv_bias[d]) + now * tap[MEMORY];
      UNROLL for (int j = MEMORY - 1; j >= 0; --j) {
        past[j] = what == 1 ? 0.0f : past[j];
        sum += past[j] * tap[j];
      }
      inputs[(row + t) * BLOCK + i] = static_cast<float>(static_cast<T>(sum));
      UNROLL for (int j = 0; j < MEMORY; ++j) {
        const float next = j + 1 < MEMORY ? past[j + 1] : now;
        past[j] = what == 2 ? past[j] : next;
      }
    }
    if (i >= first_column && i < first_column + COLUMNS) {
      UNROLL for (int j = 0; j < MEMORY; ++j) {
        new_conv_state[(entry * MEMORY + j) * width + d] = static_cast<T>(past[j]);
      }
    }
  } else {
    for (int t = 0; t < steps; ++t) {
      inputs[(row + t) * BLOCK + i] = 0.0f;
    }
  }
}
for (int n = entries * steps * BLOCK + thread_index; n < ROWS * BLOCK; n += THREADS) {
  inputs[n] = 0.0f;
}
threadgroup_barrier(mem_flags::mem_threadgroup);

// 2. Gates.
float product_i[ROWS][WIDE];
float product_r[ROWS][WIDE];
UNROLL for (int m = 0; m < ROWS; ++m) {
  UNROLL for (int c = 0; c < WIDE; ++c) {
    product_i[m][c] = 0.0f;
    product_r[m][c] = 0.0f;
  }
}
for (int n = 0; n < SHARE; n += AHEAD) {
  float weight_i[AHEAD][WIDE];
  float weight_r[AHEAD][WIDE];
  UNROLL for (int a = 0; a < AHEAD; ++a) {
    const int i = simdgroup * SHARE + n + a;
    UNROLL for (int c = 0; c < WIDE; ++c) {
      const int column = first_column + lane * WIDE + c;
      const bool real = WHOLE || (i < BLOCK && column < BLOCK);
      const int at = real ? (first_channel + i) * BLOCK + column : 0;
      weight_i[a][c] = real ? static_cast<float>(input_weight[at]) : 0.0f;
      weight_r[a][c] = real ? static_cast<float>(recurrent_weight[at]) : 0.0f;
    }
  }
  UNROLL for (int a = 0; a < AHEAD; ++a) {
    const int i = metal::min(simdgroup * SHARE + n + a, BLOCK - 1);
    UNROLL for (int m = 0; m < ROWS; ++m) {
      const float value = inputs[m * BLOCK + i];
      UNROLL for (int c = 0; c < WIDE; ++c) {
        product_i[m][c] += value * weight_i[a][c];
        product_r[m][c] += value * weight_r[a][c];
      }
    }
  }
}
UNROLL for (int m = 0; m < ROWS; ++m) {
  UNROLL for (int c = 0; c < WIDE; ++c) {
    parts[(2 * simdgroup) * COLUMNS + lane * WIDE + c] = product_i[m][c];
    parts[(2 * simdgroup + 1) * COLUMNS + lane * WIDE + c] = product_r[m][c];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int n = thread_index; n < 2 * COLUMNS; n += THREADS) {
    float sum = 0.0f;
    for (int s = 0; s < SIMDGROUPS; ++s) {
      sum += parts[s * 2 * COLUMNS + n];
    }
    gates[m * 2 * COLUMNS + n] = sum;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// 3. Recurrence and output.
for (int n = thread_index; n < entries * COLUMNS; n += THREADS) {
  const int row = n / COLUMNS * steps;
  const int column = n % COLUMNS;
  const int i = first_column + column;
  const int entry = first_entry + n / COLUMNS;
  if (entry < batch_size && i < BLOCK) {
    const int d = first_channel + i;
    const float rate = -8.0f * softplus(static_cast<float>(a_param[d]));
    float state = h0[entry * width + d];
    for (int t = 0; t < steps; ++t) {
      const int what = static_cast<int>(token_type[entry * type_row + t * type_step]);
      const int gate = (row + t) * 2 * COLUMNS + column;
      const float gate_i = gates[gate] + static_cast<float>(input_bias[d]);
      const float gate_r = gates[gate + COLUMNS] + static_cast<float>(recurrent_bias[d]);
      const float log_a = rate * sigmoid(gate_r);
      const float a = metal::precise::exp(log_a);
      const float multiplier =
          what == 1 ? 1.0f : metal::precise::sqrt(one_minus_square(log_a, a));
      const float input = multiplier * sigmoid(gate_i) * inputs[(row + t) * BLOCK + i];
      const float kept = what == 1 ? 0.0f : a * state;
      state = what == 2 ? state : kept + input;
      const int at = (entry * steps + t) * width + d;
      const float y = static_cast<float>(y_branch[at]);
      const float curve = metal::precise::tanh(0.7978845608f * (y + 0.044715f * y * y * y));
      out[at] = static_cast<T>(0.5f * y * (1.0f + curve) * state);
    }
    h[entry * width + d] = state;
  }
}
