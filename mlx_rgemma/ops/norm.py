"""RMSNorm with the factor 1 + weight, and the addition to the residual stream before it.

Where `kernels` allows it, either is one launch, and for a prompt on a Linux CPU one loop; elsewhere
it is `mx.fast.rms_norm` in fp32 on a GPU, and on a CPU, where that adds up a row in sequence, its
equation with a sum by groups.
Gradients are those of the plain operations.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_rgemma.ops import kernels, loops
from mlx_rgemma.ops.fused import run_fused
from mlx_rgemma.ops.kernels import SIMD, ceil_div, sample
from mlx_rgemma.ops.sums import long_sum

MOST_SIMDGROUPS = 16


def rms_norm(
    x: mx.array, weight: mx.array, eps: float = 1e-6, *, dtype: mx.Dtype | None = None
) -> mx.array:
    """``x / sqrt(mean(x^2) + eps) * (1 + weight)`` over the last axis, in fp32.

    Root mean square layer normalization (arXiv:1910.07467, eq. 4), with Gemma's factor.

    Args:
        x: (..., N), any float.
        weight: (N,), any float.
        eps: Added to the mean of the squares.
        dtype: Of the result; that of `x` when omitted.

    Returns:
        (..., N).

    Raises:
        ValueError: If the shapes do not agree.
    """
    _check("rms_norm", x, weight)
    dtype = dtype or x.dtype

    def plain(x, weight):
        return [_plain(x, weight, eps, dtype)]

    def launch(x, weight):
        return _launch(x, weight, eps, dtype)

    usable = NORM.usable(x.dtype, weight.dtype, dtype)
    (y,) = run_fused(launch, plain, x, weight) if usable else plain(x, weight)
    return y


def add_rms_norm(
    x: mx.array,
    delta: mx.array,
    weight: mx.array,
    eps: float = 1e-6,
    *,
    dtype: mx.Dtype | None = None,
) -> tuple[mx.array, mx.array]:
    """Add to the residual stream, and normalize the sum.

    Args:
        x: (..., N), any float. The stream, whose dtype the sum keeps.
        delta: (..., N), any float. What is added to it.
        weight, eps: As for `rms_norm`.
        dtype: Of the normalized sum; that of `delta` when omitted.

    Returns:
        ``(x + delta, rms_norm(x + delta))``, each (..., N).

    Raises:
        ValueError: If the shapes do not agree.
    """
    _check("add_rms_norm", x, weight)
    if delta.shape != x.shape:
        raise ValueError(f"[add_rms_norm] delta has shape {delta.shape}, x has {x.shape}.")
    dtype = dtype or delta.dtype

    def plain(x, delta, weight):
        return _plain_add(x, delta, weight, eps, dtype)

    def launch(x, delta, weight):
        return _launch_add(x, delta, weight, eps, dtype)

    usable = ADD_NORM.usable(x.dtype, delta.dtype, weight.dtype, dtype)
    total, y = run_fused(launch, plain, x, delta, weight) if usable else plain(x, delta, weight)
    return total, y


def _plain(x, weight, eps, dtype):
    scale = 1.0 + weight.astype(mx.float32)
    if loops.worthwhile(x) and (ready := loops.ready(x, scale)) is not None:
        rows = ready[0].reshape(-1, x.shape[-1])
        y = np.empty(rows.shape, np.float32)
        loops.run("rms_norm", rows.shape[0], rows, ready[1], np.float32(eps), y)
        return mx.array(y).reshape(x.shape).astype(dtype)
    x = x.astype(mx.float32)
    if mx.default_device().type == mx.gpu:
        return mx.fast.rms_norm(x, scale, eps).astype(dtype)  # one launch, which adds up as a tree
    mean_square = long_sum(mx.square(x)) / x.shape[-1]
    return (x * mx.rsqrt(mean_square + eps) * scale).astype(dtype)


def _plain_add(x, delta, weight, eps, dtype):
    if x.dtype == mx.float32 and loops.worthwhile(x):
        ready = loops.ready(x, delta, 1.0 + weight.astype(mx.float32))
        if ready is not None:
            rows, deltas = (z.reshape(-1, x.shape[-1]) for z in ready[:2])
            total, y = np.empty(rows.shape, np.float32), np.empty(rows.shape, np.float32)
            arrays = (rows, deltas, ready[2], np.float32(eps), total, y)
            loops.run("add_rms_norm", rows.shape[0], *arrays)
            return mx.array(total).reshape(x.shape), mx.array(y).reshape(x.shape).astype(dtype)
    total = (x.astype(mx.float32) + delta.astype(mx.float32)).astype(x.dtype)
    return total, _plain(total, weight, eps, dtype)


def _launch(x, weight, eps, dtype):
    rows, width, simdgroups = _geometry(x)
    (y,) = NORM.run(
        [x.reshape(rows, width), weight, mx.array([eps], mx.float32)],
        [((rows, width), dtype)],
        groups=(rows, 1, 1),
        threadgroup=(SIMD * simdgroups, 1, 1),
        template={"T": dtype},
    )
    return [y.reshape(x.shape)]


def _launch_add(x, delta, weight, eps, dtype):
    rows, width, simdgroups = _geometry(x)
    total, y = ADD_NORM.run(
        [x.reshape(rows, width), delta.reshape(rows, width), weight, mx.array([eps], mx.float32)],
        [((rows, width), x.dtype), ((rows, width), dtype)],
        groups=(rows, 1, 1),
        threadgroup=(SIMD * simdgroups, 1, 1),
        template={"S": x.dtype, "T": dtype},
    )
    return [total.reshape(x.shape), y.reshape(x.shape)]


def _geometry(x: mx.array) -> tuple[int, int, int]:
    """Rows, width, and simdgroups of a row's threadgroup: about 8 channels a thread."""
    width = x.shape[-1]
    return x.size // width, width, min(MOST_SIMDGROUPS, ceil_div(width, 8 * SIMD))


def _check(name: str, x: mx.array, weight: mx.array) -> None:
    if x.size == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"[{name}] weight has shape {weight.shape}, x has {x.shape}, which must not be empty"
            " and end in it."
        )


_EPS = 1e-6
_WIDTH = 8 * SIMD * MOST_SIMDGROUPS - 3


def _example(x_dtype, weight_dtype, dtype):
    x, weight = sample((2, _WIDTH), x_dtype, 1), sample((_WIDTH,), weight_dtype, 2)
    return x, weight, _EPS, dtype


def _example_add(x_dtype, delta_dtype, weight_dtype, dtype):
    x, weight, *rest = _example(x_dtype, weight_dtype, dtype)
    return x, sample((2, _WIDTH), delta_dtype, 3), weight, *rest


NORM = kernels.register(
    "rms_norm",
    inputs=("x", "weight", "eps"),
    outputs=("normalized",),
    launch=_launch,
    reference=lambda *arguments: [_plain(*arguments)],
    example=_example,
    variants=[(mx.float32, dtype, dtype) for dtype in kernels.FLOATS],
)

ADD_NORM = kernels.register(
    "add_rms_norm",
    inputs=("x", "delta", "weight", "eps"),
    outputs=("sum", "normalized"),
    launch=_launch_add,
    reference=_plain_add,
    example=_example_add,
    variants=[(mx.float32, dtype, dtype, dtype) for dtype in kernels.FLOATS],
)
