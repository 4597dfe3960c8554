"""Cross entropy of soft-capped logits, and its gradient as one array of the size of the logits.

Automatic gradients make several such arrays.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlx_rgemma.ops.activations import soft_cap
from mlx_rgemma.ops.autograd import custom_function
from mlx_rgemma.ops.backend import Operation
from mlx_rgemma.ops.sums import log_sum_exp


def cross_entropies(scores: mx.array, targets: mx.array, cap: float) -> mx.array:
    """Return ``logsumexp(logits) - logits[target]`` per row, where ``logits = soft_cap(scores)``.

    Differentiable in `scores`.

    Args:
        scores: (N, V), any float.
        targets: (N,), int. One that is out of range counts as the last: to read them here would
            wait for them, and MLX would write beyond the scores.
        cap: Soft cap of the logits; 0 for none.

    Returns:
        (N,), fp32, in nats.
    """
    if targets.itemsize < 4:
        targets = targets.astype(mx.int32)
    unsigned = mx.uint32 if targets.itemsize == 4 else mx.uint64  # negative ones are the largest
    targets = mx.minimum(targets.view(unsigned), scores.shape[-1] - 1)
    losses: mx.array = CROSS_ENTROPIES(scores, targets, cap=cap)
    return losses


def reference(scores: mx.array, targets: mx.array, *, cap: float) -> mx.array:
    """`cross_entropies` in plain MLX."""

    def forward(scores: Any) -> Any:
        logits = soft_cap(scores, mx.array(cap)) if cap else scores.astype(mx.float32)
        normalizers = log_sum_exp(logits)[:, 0]
        chosen = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        return [normalizers - chosen, normalizers, logits]

    losses = custom_function(forward)

    @losses.vjp
    def gradient(scores: Any, cotangents: Any, outputs: Any) -> Any:
        _, normalizers, logits = outputs
        columns = mx.arange(logits.shape[1], dtype=targets.dtype)
        arrays = (logits, normalizers[:, None], columns, targets[:, None], cotangents[0][:, None])
        slopes = _compiled_slopes if mx.default_device().type == mx.gpu else _slopes
        return (slopes(*arrays, *([mx.array(cap)] if cap else [])).astype(scores.dtype),)

    result: mx.array = losses(scores)[0]
    return result


CROSS_ENTROPIES = Operation(reference)


def _slopes(
    logits: mx.array,
    normalizers: mx.array,
    columns: mx.array,
    targets: mx.array,
    factors: mx.array,
    cap: mx.array | None = None,
) -> mx.array:
    """``(softmax - one-hot) * factor``, and the slope of the soft cap, ``1 - (logits / cap)^2``."""
    slopes = (mx.exp(logits - normalizers) - (columns == targets).astype(mx.float32)) * factors
    return slopes if cap is None else slopes * (1.0 - mx.square(logits / cap))


_compiled_slopes = mx.compile(_slopes, shapeless=True)
