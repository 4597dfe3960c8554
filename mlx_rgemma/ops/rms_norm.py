"""RMSNorm with the factor 1 + weight, and the addition to the residual stream before it.

Kernels: ``metal/rms_norm.metal`` and ``metal/add_rms_norm.metal``. Gradients are the reference's.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlx_rgemma.ops import metal
from mlx_rgemma.ops.backend import Backend, Operation
from mlx_rgemma.ops.metal import SIMD, MetalKernel, ceil_div, sample
from mlx_rgemma.ops.sums import long_sum


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
    y: mx.array = RMS_NORM(x, weight, eps=eps, dtype=dtype or x.dtype)
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
        delta: (..., N), any float. The branch to add.
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
    total, y = ADD_RMS_NORM(x, delta, weight, eps=eps, dtype=dtype or delta.dtype)
    return total, y


def reference(x: mx.array, weight: mx.array, *, eps: float, dtype: mx.Dtype) -> mx.array:
    """The equation above in plain MLX."""
    scale = 1.0 + weight.astype(mx.float32)
    x = x.astype(mx.float32)
    mean_square = long_sum(mx.square(x)) / x.shape[-1]
    return (x * mx.rsqrt(mean_square + eps) * scale).astype(dtype)


def add_reference(
    x: mx.array, delta: mx.array, weight: mx.array, *, eps: float, dtype: mx.Dtype
) -> tuple[mx.array, mx.array]:
    """`add_rms_norm` in plain MLX."""
    total = (x.astype(mx.float32) + delta.astype(mx.float32)).astype(x.dtype)
    return total, reference(total, weight, eps=eps, dtype=dtype)


RMS_NORM = Operation(reference)
ADD_RMS_NORM = Operation(add_reference)


# The Metal kernels.

MAX_SIMDGROUPS = 16


@RMS_NORM.implementation(
    Backend.METAL,
    supports=lambda x, weight, *, eps, dtype: NORM.validated(x.dtype, weight.dtype, dtype),
)
def _metal(x: mx.array, weight: mx.array, *, eps: float, dtype: mx.Dtype) -> Any:
    return _launch(x, weight, eps, dtype)[0]


@RMS_NORM.implementation(Backend.METAL, gradient="own")
def _mlx(x: mx.array, weight: mx.array, *, eps: float, dtype: mx.Dtype) -> mx.array:
    """MLX's own kernel, which sums as a tree."""
    scale = 1.0 + weight.astype(mx.float32)
    return mx.fast.rms_norm(x.astype(mx.float32), scale, eps).astype(dtype)


@ADD_RMS_NORM.implementation(
    Backend.METAL,
    supports=lambda x, delta, weight, *, eps, dtype: ADD_NORM.validated(
        x.dtype, delta.dtype, weight.dtype, dtype
    ),
)
def _metal_add(
    x: mx.array, delta: mx.array, weight: mx.array, *, eps: float, dtype: mx.Dtype
) -> Any:
    return tuple(_launch_add(x, delta, weight, eps, dtype))


@ADD_RMS_NORM.implementation(Backend.METAL, gradient="own")
def _mlx_add(x: mx.array, delta: mx.array, weight: mx.array, *, eps: float, dtype: mx.Dtype) -> Any:
    total = (x.astype(mx.float32) + delta.astype(mx.float32)).astype(x.dtype)
    return total, _mlx(total, weight, eps=eps, dtype=dtype)


def _launch(x: mx.array, weight: mx.array, eps: float, dtype: mx.Dtype) -> Any:
    rows, width, simdgroups = _geometry(x)
    (y,) = NORM.run(
        [x.reshape(rows, width), weight, mx.array([eps], mx.float32)],
        [((rows, width), dtype)],
        groups=(rows, 1, 1),
        threadgroup=(SIMD * simdgroups, 1, 1),
        template={"T": dtype},
    )
    return [y.reshape(x.shape)]


def _launch_add(x: mx.array, delta: mx.array, weight: mx.array, eps: float, dtype: mx.Dtype) -> Any:
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
    """Return rows, width, and simdgroups of a row's threadgroup: about 8 channels per thread."""
    width = x.shape[-1]
    return x.size // width, width, min(MAX_SIMDGROUPS, ceil_div(width, 8 * SIMD))


def _check(name: str, x: mx.array, weight: mx.array) -> None:
    if x.size == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"[{name}] weight has shape {weight.shape}, x has {x.shape}, which must not be empty"
            " and end in it."
        )


_EPS = 1e-6
_WIDTH = 8 * SIMD * MAX_SIMDGROUPS - 3


def _sample_inputs(x_dtype: mx.Dtype, weight_dtype: mx.Dtype, dtype: mx.Dtype) -> tuple[Any, ...]:
    x, weight = sample((2, _WIDTH), x_dtype, 1), sample((_WIDTH,), weight_dtype, 2)
    return x, weight, _EPS, dtype


def _sample_inputs_add(
    x_dtype: mx.Dtype, delta_dtype: mx.Dtype, weight_dtype: mx.Dtype, dtype: mx.Dtype
) -> tuple[Any, ...]:
    x, weight, *rest = _sample_inputs(x_dtype, weight_dtype, dtype)
    return x, sample((2, _WIDTH), delta_dtype, 3), weight, *rest


NORM: MetalKernel = MetalKernel(
    "rms_norm",
    inputs=("x", "weight", "eps"),
    outputs=("normalized",),
    launch=_launch,
    reference=lambda x, weight, eps, dtype: [reference(x, weight, eps=eps, dtype=dtype)],
    sample_inputs=_sample_inputs,
    variants=[(mx.float32, dtype, dtype) for dtype in metal.FLOATS],
)

ADD_NORM: MetalKernel = MetalKernel(
    "add_rms_norm",
    inputs=("x", "delta", "weight", "eps"),
    outputs=("sum", "normalized"),
    launch=_launch_add,
    reference=lambda *arrays: add_reference(*arrays[:3], eps=arrays[3], dtype=arrays[4]),
    sample_inputs=_sample_inputs_add,
    variants=[(mx.float32, dtype, dtype, dtype) for dtype in metal.FLOATS],
)
