// RMSNorm with the factor 1 + weight, in float32.
//
//   normalized = x / sqrt(mean(x^2) + eps) * (1 + weight)
//
// reads   x (rows, N), any float; weight (N), any float; eps (1) float32
// writes  normalized (rows, N), of type T
//
// Threads. A threadgroup takes a row, neighbouring threads neighbouring channels: once for the
// mean, and once more, then from the cache, for the output.

threadgroup float squares[32];

const int width = x_shape[1];
const int lane = static_cast<int>(thread_index_in_simdgroup);
const int simdgroup = static_cast<int>(simdgroup_index_in_threadgroup);
const int simdgroups = static_cast<int>(simdgroups_per_threadgroup);
const int threads = 32 * simdgroups;
const int thread_index = 32 * simdgroup + lane;
const size_t row = static_cast<size_t>(threadgroup_position_in_grid.x) * width;

float square = 0.0f;
for (int n = thread_index; n < width; n += threads) {
  const float value = static_cast<float>(x[row + n]);
  square += value * value;
}
square = metal::simd_sum(square);
if (lane == 0) {
  squares[simdgroup] = square;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
square = 0.0f;
for (int s = 0; s < simdgroups; ++s) {
  square += squares[s];
}
const float scale = metal::precise::rsqrt(square / static_cast<float>(width) + eps[0]);

for (int n = thread_index; n < width; n += threads) {
  const float factor = 1.0f + static_cast<float>(weight[n]);
  normalized[row + n] = static_cast<T>(static_cast<float>(x[row + n]) * scale * factor);
}
