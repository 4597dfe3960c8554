"""Long sums that keep float32's accuracy on any machine.

On a CPU, MLX adds up a row in sequence: of the 256,000 powers of a vocabulary, the sum is off by
4e-4 of itself, of 2,560 squares by 4e-7. Groups of a bounded size are added up here, then their
sums, and so on: every level adds one rounding of a short sum. A GPU reduces as a tree anyway, and
loses one small launch.
"""

from __future__ import annotations

import mlx.core as mx

GROUP = 64
"""Values that are added in sequence."""
LOG_GROUP = 512
"""Logits whose powers are; MLX's own `logsumexp` adds as many at a time as a vector holds."""


def long_sum(x: mx.array) -> mx.array:
    """Return the sum over the last axis, which stays with size 1: (..., N) to (..., 1)."""
    while x.shape[-1] > GROUP:
        x = _groups(x, GROUP, 0.0).sum(axis=-1)
    return x.sum(axis=-1, keepdims=True)


def log_sum_exp(logits: mx.array) -> mx.array:
    """Return ``log(sum(exp(logits)))`` over the last axis, which stays with size 1."""
    while logits.shape[-1] > LOG_GROUP:
        logits = mx.logsumexp(_groups(logits, LOG_GROUP, -mx.inf), axis=-1)
    return mx.logsumexp(logits, axis=-1, keepdims=True)


def log_softmax(logits: mx.array) -> mx.array:
    """Return logits as log-probabilities, along the last axis."""
    return logits - log_sum_exp(logits)


def _groups(x: mx.array, size: int, filling: float) -> mx.array:
    """Cut the last axis into groups: (..., N) to (..., ceil(N / size), size)."""
    rest = -x.shape[-1] % size
    if rest:
        x = mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, rest)], constant_values=filling)
    return x.reshape(*x.shape[:-1], -1, size)
