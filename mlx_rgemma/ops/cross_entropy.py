"""Cross entropy of soft-capped scores, and its gradient as one array of the size of the scores.

Automatic gradients make several such arrays. On a Linux CPU the gradient is computed along with the
loss, out of the same powers, and rows are shared between two threads.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_rgemma.ops.elementwise import soft_cap
from mlx_rgemma.ops.exponential import LOG2_E, exp2, tanh
from mlx_rgemma.ops.fused import custom_function, forward_only
from mlx_rgemma.ops.lanes import in_halves
from mlx_rgemma.ops.processor import on_linux_cpu
from mlx_rgemma.ops.sums import log_sum_exp, long_sum


def cross_entropies(scores: mx.array, targets: mx.array, cap: float) -> mx.array:
    """``logsumexp(logits) - logits[target]`` of each row, where ``logits = soft_cap(scores)``.

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
    return (_on_cpu if on_linux_cpu() else _anywhere)(scores, targets, cap)


def _anywhere(scores: mx.array, targets: mx.array, cap: float) -> mx.array:
    """By MLX's own operations."""

    def forward(scores):
        logits = soft_cap(scores, mx.array(cap)) if cap else scores.astype(mx.float32)
        normalizers = log_sum_exp(logits)[:, 0]
        chosen = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        return [normalizers - chosen, normalizers, logits]

    losses = custom_function(forward)

    @losses.vjp
    def gradient(scores, cotangents, outputs):
        _, normalizers, logits = outputs
        columns = mx.arange(logits.shape[1], dtype=targets.dtype)
        arrays = (logits, normalizers[:, None], columns, targets[:, None], cotangents[0][:, None])
        slopes = _compiled_slopes if mx.default_device().type == mx.gpu else _slopes
        return (slopes(*arrays, *([mx.array(cap)] if cap else [])).astype(scores.dtype),)

    result: mx.array = losses(scores)[0]
    return result


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


def _on_cpu(scores: mx.array, targets: mx.array, cap: float) -> mx.array:
    """Out of `exponential`, for a Linux CPU."""

    def rows(scores, wanted):
        logits = tanh(scores * (1.0 / cap)) * cap if cap else scores
        top = logits.max(axis=-1, keepdims=True)
        powers = exp2((logits - top) * LOG2_E)
        total = long_sum(powers)
        loss = mx.log(total) + top - mx.take_along_axis(logits, wanted, axis=-1)
        # softmax - one-hot, times the slope of the soft cap
        slopes = powers * mx.reciprocal(total)
        at_target = mx.take_along_axis(slopes, wanted, axis=-1) - 1.0
        slopes = mx.put_along_axis(slopes, wanted, at_target, axis=-1)
        return loss, slopes * (1.0 - mx.square(logits * (1.0 / cap))) if cap else slopes

    @custom_function
    def losses(scores):
        with forward_only():  # what has a gradient of its own in there need not keep for it
            loss, slopes = in_halves(rows, scores.astype(mx.float32), targets[:, None])
        return [loss[:, 0], slopes]

    @losses.vjp
    def gradient(scores, cotangents, outputs):
        return ((outputs[1] * cotangents[0][:, None]).astype(scores.dtype),)

    result: mx.array = losses(scores)[0]
    return result
