"""Matrix products of activations and weights: dense, quantized, and block-diagonal."""

from __future__ import annotations

import mlx.core as mx

from mlx_rgemma.ops.backend import Operation


def linear(x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
    """Return ``x @ weight.T + bias``.

    Args:
        x: (..., in), any float.
        weight: (out, in).
        bias: (out,).

    Returns:
        (..., out), dtype of the product.
    """
    y: mx.array = LINEAR(x, weight, bias)
    return y


def _linear(x: mx.array, weight: mx.array, bias: mx.array | None) -> mx.array:
    return x @ weight.T if bias is None else mx.addmm(bias, x, weight.T)


LINEAR = Operation(_linear)


def quantized_linear(
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    *,
    group_size: int,
    bits: int,
    mode: str,
) -> mx.array:
    """Return ``x @ W.T`` with W quantized by `mx.quantize`.

    Args:
        x: (..., in), any float.
        weight: (out, in * bits / 32), uint32.
        scales, biases: (out, in / group_size); no biases in a mode without them.
        group_size, bits, mode: As given to `mx.quantize`.

    Returns:
        (..., out), dtype of the product.
    """
    y: mx.array = QUANTIZED_LINEAR(
        x, weight, scales, biases, group_size=group_size, bits=bits, mode=mode
    )
    return y


def _quantized_linear(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array | None, **how: int | str
) -> mx.array:
    return mx.quantized_matmul(x, weight, scales, biases, transpose=True, **how)  # type: ignore[arg-type]


QUANTIZED_LINEAR = Operation(_quantized_linear)


def block_diagonal(x: mx.array, weight: mx.array) -> mx.array:
    """Multiply each head's channels with its own matrix (Griffin, arXiv:2402.19427, A.1).

    Args:
        x: (B, L, D), any float.
        weight: (heads, D / heads, D / heads), used as ``x @ weight``.

    Returns:
        (B, L, D), dtype of the product.
    """
    y: mx.array = BLOCK_DIAGONAL(x, weight)
    return y


def _block_diagonal(x: mx.array, weight: mx.array) -> mx.array:
    batch, length, width = x.shape
    heads = x.reshape(batch, length, weight.shape[0], -1).swapaxes(1, 2)
    return (heads @ weight).swapaxes(1, 2).reshape(batch, length, width)


BLOCK_DIAGONAL = Operation(_block_diagonal)
