"""Cross entropy of soft-capped scores, and its gradient as one array of the size of the scores.

Automatic gradients make several such arrays. On a Linux CPU the softmax is kept from the forward
pass, where exp costs more than memory, and both passes share their rows between two threads.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from mlx_rgemma.ops.elementwise import soft_cap
from mlx_rgemma.ops.exponential import LOG2_E, exp2, on_linux_cpu, tanh
from mlx_rgemma.ops.fused import custom_function
from mlx_rgemma.ops.lanes import in_halves


def cross_entropies(scores: mx.array, targets: mx.array, cap: float) -> mx.array:
    """``logsumexp(logits) - logits[target]`` of each row, where ``logits = soft_cap(scores)``.

    Differentiable in `scores`.

    Args:
        scores: (N, V), any float.
        targets: (N,), int.
        cap: Soft cap of the logits; 0 for none.

    Returns:
        (N,), fp32, in nats.
    """
    forward, backward = (_on_cpu if on_linux_cpu() else _anywhere)(targets, cap)
    losses = custom_function(forward)

    @losses.vjp
    def gradient(primals, cotangents, outputs):
        dtype = (primals if isinstance(primals, mx.array) else primals[0]).dtype
        return (backward(cotangents[0], *outputs[1:]).astype(dtype),)

    result: mx.array = losses(scores)[0]
    return result


_Pass = Callable[..., mx.array | list[mx.array]]


def _anywhere(targets: mx.array, cap: float) -> tuple[_Pass, _Pass]:
    """The passes of MLX's own operations: scores to losses and more, from these to a gradient."""

    def forward(scores):
        logits = soft_cap(scores, mx.array(cap)) if cap else scores.astype(mx.float32)
        normalizers = mx.logsumexp(logits, axis=-1)
        chosen = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        return [normalizers - chosen, normalizers, logits]

    def backward(factors, normalizers, logits):
        columns = mx.arange(logits.shape[1], dtype=targets.dtype)
        arrays = (logits, normalizers[:, None], columns, targets[:, None], factors[:, None])
        slopes = _compiled_slopes if mx.default_device().type == mx.gpu else _slopes
        return slopes(*arrays, *([mx.array(cap)] if cap else []))

    return forward, backward


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


def _on_cpu(targets: mx.array, cap: float) -> tuple[_Pass, _Pass]:
    """The same out of `exponential`, for a Linux CPU."""
    wanted = targets[:, None]

    def losses(scores, wanted):
        curve = tanh(scores * (1.0 / cap)) if cap else scores
        logits = curve * cap if cap else scores
        top = logits.max(axis=-1, keepdims=True)
        powers = exp2((logits - top) * LOG2_E)
        total = powers.sum(axis=-1, keepdims=True)
        loss = mx.log(total) + top - mx.take_along_axis(logits, wanted, axis=-1)
        return (loss, powers * mx.reciprocal(total), *([curve] if cap else []))

    def forward(scores):
        loss, *kept = in_halves(losses, scores.astype(mx.float32), wanted)
        return [loss[:, 0], *kept]

    def slopes(factors, wanted, shares, *curve):
        slopes, own = shares * factors, factors
        for z in curve:
            slopes = slopes * (1.0 - mx.square(z))
            own = own * (1.0 - mx.square(mx.take_along_axis(z, wanted, axis=-1)))
        own = mx.take_along_axis(slopes, wanted, axis=-1) - own
        return (mx.put_along_axis(slopes, wanted, own, axis=-1),)

    def backward(factors, *kept):
        return in_halves(slopes, factors[:, None], wanted, *kept)[0]

    return forward, backward
