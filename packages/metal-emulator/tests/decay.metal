// exp(-softplus(rate)): between 0 and 1.
METAL_FUNC float decay(float rate) {
  return 1.0f / (1.0f + metal::exp(rate));
}
