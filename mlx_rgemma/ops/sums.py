"""Long sums that keep float32's accuracy on any machine.

On a CPU, MLX adds up a row in sequence: of 256,000 exponentials, the sum is off by
4e-4 of itself, of 2,560 squares by 4e-7. Groups of a bounded size are added up here, then their
sums, and so on: every level adds one rounding of a short sum. A GPU reduces as a tree anyway, and
loses one small launch.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

GROUP = 64
"""Values that are added in sequence."""
LOG_GROUP = 512
"""Logits whose powers are; MLX's own `logsumexp` adds as many at a time as a vector holds."""


def long_sum(x: mx.array) -> mx.array:
    """Return the sum over the last axis, which stays with size 1: (..., N) to (..., 1)."""
    while x.shape[-1] > GROUP:
        x = _by_groups(x, GROUP, lambda z: z.sum(axis=-1))
    return x.sum(axis=-1, keepdims=True)


def log_sum_exp(logits: mx.array) -> mx.array:
    """Return ``log(sum(exp(logits)))`` over the last axis, which stays with size 1."""
    while logits.shape[-1] > LOG_GROUP:
        logits = _by_groups(logits, LOG_GROUP, lambda z: mx.logsumexp(z, axis=-1))
    return mx.logsumexp(logits, axis=-1, keepdims=True)


def log_softmax(logits: mx.array) -> mx.array:
    """Return logits as log-probabilities, along the last axis."""
    return logits - log_sum_exp(logits)


def _by_groups(x: mx.array, size: int, reduce: Callable[[mx.array], mx.array]) -> mx.array:
    """Reduce each group of `size` values of the last axis, and the rest: nothing is copied."""
    whole = x.shape[-1] // size * size
    parts = reduce(x[..., :whole].reshape(*x.shape[:-1], -1, size))
    if whole == x.shape[-1]:
        return parts
    return mx.concatenate([parts, reduce(x[..., whole:])[..., None]], axis=-1)
