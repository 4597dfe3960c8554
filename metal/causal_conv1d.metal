// The causal depthwise convolution, forward.
//
//   y_t = bias + sum_j weight[K-1-j] x_{t-j},   j = 0 .. K-1,   without the taps that reach into an
//   earlier document: j > segment_pos_t
//
// where x_{-1}, x_{-2}, ... are the rows of `state`, oldest first. new_state holds the inputs that
// come before the next token, x_{n-K+1} .. x_{n-1} of the n real ones, 0 where an input belongs to
// an earlier document than the last one.
//
// Threads: threadgroup (32, G), grid (ceil(D / 32), ceil(T / (STEPS G)), B) of it. A lane is a
// channel, and slides over STEPS consecutive tokens. The threads of the first tokens write
// new_state.
//
// Reads x (B, T, D), K - 1 of each STEPS + K - 1 a second time; writes y once, new_state
// (B, K-1, D). No threadgroup memory, no barrier.
//
// dims: T, D, step of `bias` from channel to channel, steps of `segment_pos` from sequence to
// sequence and from token to token, step of `lengths` from sequence to sequence: 0 where one value
// holds for all.

const int length = dims[0];
const uint width = uint(dims[1]);
const uint channel = thread_position_in_grid.x;
const uint row = thread_position_in_grid.z;
const int first = int(thread_position_in_grid.y) * STEPS;
if (channel >= width || first >= length) {
  return;
}
const ulong base = ulong(row) * ulong(length) * width + channel;
const uint past = row * uint(K - 1) * width + channel;
const uint positions = row * uint(dims[3]);

// window[k] is the input K - 1 - k tokens before the first.
float window[STEPS + K - 1];
UNROLL
for (int k = 0; k < K - 1; ++k) {
  const int t = first + k - (K - 1);
  window[k] = t < 0 ? static_cast<float>(state[past + uint(t + K - 1) * width])
                    : static_cast<float>(x[base + ulong(t) * width]);
}
UNROLL
for (int k = 0; k < STEPS; ++k) {
  const int t = metal::min(first + k, length - 1);
  window[k + K - 1] = static_cast<float>(x[base + ulong(t) * width]);
}
float taps[K];
UNROLL
for (int k = 0; k < K; ++k) {
  taps[k] = static_cast<float>(weight[channel * K + k]);
}
const float offset = static_cast<float>(bias[channel * uint(dims[2])]);

UNROLL
for (int k = 0; k < STEPS; ++k) {
  const int t = metal::min(first + k, length - 1);
  const long position = static_cast<long>(segment_pos[positions + uint(t) * uint(dims[4])]);
  float sum = offset;
  UNROLL
  for (int j = 0; j < K; ++j) {
    sum += position >= j ? taps[K - 1 - j] * window[k + K - 1 - j] : 0.0f;
  }
  if (first + k < length) {
    y[base + ulong(t) * width] = static_cast<T>(sum);
  }
}

if (first == 0) {
  const int real = int(lengths[row * uint(dims[5])]);
  const int last = metal::max(real, 1) - 1;
  const long position = static_cast<long>(segment_pos[positions + uint(last) * uint(dims[4])]);
  for (int k = 0; k < K - 1; ++k) {
    const int t = real - (K - 1) + k;
    const float kept = t < 0 ? static_cast<float>(state[past + uint(t + K - 1) * width])
                             : static_cast<float>(x[base + ulong(t) * width]);
    // A sequence without a token keeps its state.
    const bool same_document = real == 0 || position >= K - 2 - k;
    new_state[past + uint(k) * width] = static_cast<T>(same_document ? kept : 0.0f);
  }
}
