// y_t = decay(rate_t) y_(t-1) + x_t along each channel of x (B, length, width), from y_(-1) = start.
//
// Grid (width, S, B), threadgroup (32, S, 1): a lane is a channel, each of S simdgroups takes L steps
// of a tile. Within a tile the simdgroups exchange what their steps multiply and add.
const uint lane = thread_index_in_simdgroup;
const uint s = simdgroup_index_in_threadgroup;
const uint d = threadgroup_position_in_grid.x * 32 + lane;
const uint b = threadgroup_position_in_grid.z;
const int length = dims[0];
const uint width = uint(dims[1]);
threadgroup float products[S * 32];
threadgroup float sums[S * 32];

float carry = start[b * width + d];
for (int tile = 0; tile < length; tile += S * L) {
  float product[L];
  float sum[L];
  float running_product = 1.0f;
  float running_sum = 0.0f;
  const int first = tile + int(s) * L;
  for (int i = 0; i < L; ++i) {
    const int t = first + i;
    if (t < length) {
      const uint at = (b * uint(length) + uint(t)) * width + d;
      const float a = decay(static_cast<float>(rate[at]));
      running_product *= a;
      running_sum = a * running_sum + static_cast<float>(x[at]);
    }
    product[i] = running_product;
    sum[i] = running_sum;
  }
  products[s * 32 + lane] = running_product;
  sums[s * 32 + lane] = running_sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float before = carry;
  for (uint j = 0; j < uint(S); ++j) {
    if (j == s) {
      before = carry;
    }
    carry = products[j * 32 + lane] * carry + sums[j * 32 + lane];
  }
  for (int i = 0; i < L; ++i) {
    const int t = first + i;
    if (t < length) {
      y[(b * uint(length) + uint(t)) * width + d] = static_cast<T>(product[i] * before + sum[i]);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
if (s == 0) {
  last[b * width + d] = carry;
}
