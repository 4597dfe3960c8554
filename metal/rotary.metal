// Rotary position embedding of a chunk's queries and keys, and its keys and values side by side.
//
//   first half:   x_j cos_j - x_(j + pairs) sin_j,   second half:   x_j cos_j + x_(j - pairs) sin_j
//
// for the channels j < 2 pairs of each head; the others pass through.
//
// reads   q (B, L, H, D); k, v (B, L, D); cosine, sine (1 or B, L, pairs) float32; params
// writes  rotated (B, L, H, D); kv (B, 2, L, D) the rotated keys, then the values
//
// Threads. A threadgroup takes THREADS channels of one token: those of its H queries, its key and
// its value, one after the other. One channel per thread; the grid's y is the token, z the batch.

const int length = params[0];
const int heads = params[1];
const int pairs = params[2];
const int angle_stride = params[3];  // of a batch entry: L * pairs, or 0 when all share positions

const int channel = static_cast<int>(thread_position_in_grid.x);
const int token = static_cast<int>(threadgroup_position_in_grid.y);
const int batch = static_cast<int>(threadgroup_position_in_grid.z);
const size_t at = static_cast<size_t>(batch) * length + token;

if (channel < (heads + 2) * D) {
  const int n = channel / D;
  const int d = channel % D;
  const device T* x = n < heads ? q + (at * heads + n) * D : (n == heads ? k : v) + at * D;
  T value = x[d];
  if (n <= heads && d < 2 * pairs) {
    const bool first = d < pairs;
    const int angle =
        batch * angle_stride + token * pairs + (first ? d : d - pairs);
    const float partner = static_cast<float>(x[first ? d + pairs : d - pairs]);
    const float turned = first ? -partner * sine[angle] : partner * sine[angle];
    value = static_cast<T>(static_cast<float>(value) * cosine[angle] + turned);
  }
  if (n < heads) {
    rotated[(at * heads + n) * D + d] = value;
  } else {
    kv[((static_cast<size_t>(batch) * 2 + (n - heads)) * length + token) * D + d] = value;
  }
}
