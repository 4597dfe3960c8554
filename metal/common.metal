// Helpers shared by the kernels: everything here computes in float32.
//
// MLX puts this text before each kernel's function. Values only, no pointers: MLX passes an array
// of fewer than 8 elements in another address space than a larger one.

#define UNROLL _Pragma("clang loop unroll(full)")

// exp(-x) may overflow: 1 / infinity is the correct 0.
METAL_FUNC float sigmoid(float x) {
  return 1.0f / (1.0f + metal::precise::exp(-x));
}

// log(1 + exp(x)) to float32's full relative precision, also where exp(x) is lost beside 1.
// With s = u / (2 + u): log(1 + u) = 2 atanh(s), and s^2 <= 1/9 makes a short series of it.
METAL_FUNC float softplus(float x) {
  const float u = metal::precise::exp(-metal::abs(x));
  const float s = u / (2.0f + u);
  const float q = s * s;
  float series = 1.0f / 15.0f;
  series = series * q + 1.0f / 13.0f;
  series = series * q + 1.0f / 11.0f;
  series = series * q + 1.0f / 9.0f;
  series = series * q + 1.0f / 7.0f;
  series = series * q + 1.0f / 5.0f;
  series = series * q + 1.0f / 3.0f;
  series = series * q + 1.0f;
  return metal::max(x, 0.0f) + 2.0f * s * series;
}

// 1 - a^2 for a = exp(log_a), log_a <= 0. Near a = 1 the difference would keep no digit, and Metal
// has no expm1: there it is the Taylor series of 1 - exp(z) at z = 2 log_a.
METAL_FUNC float one_minus_square(float log_a, float a) {
  const float z = 2.0f * log_a;
  float series = 1.0f / 40320.0f;
  series = series * z + 1.0f / 5040.0f;
  series = series * z + 1.0f / 720.0f;
  series = series * z + 1.0f / 120.0f;
  series = series * z + 1.0f / 24.0f;
  series = series * z + 1.0f / 6.0f;
  series = series * z + 1.0f / 2.0f;
  series = series * z + 1.0f;
  return z > -0.5f ? -z * series : 1.0f - a * a;
}
