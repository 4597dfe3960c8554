"""The block-diagonal matrix products of the RG-LRU's gates."""

from __future__ import annotations

import mlx.core as mx


def block_diagonal(x: mx.array, weight: mx.array) -> mx.array:
    """Multiply each head's channels with a matrix of its own (Griffin, arXiv:2402.19427, A.1).

    Args:
        x: (B, L, D), any float.
        weight: (heads, D / heads, D / heads), used as ``x @ weight``.

    Returns:
        (B, L, D), dtype of the product.
    """
    batch, length, width = x.shape
    heads = x.reshape(batch, length, weight.shape[0], -1).swapaxes(1, 2)
    return (heads @ weight).swapaxes(1, 2).reshape(batch, length, width)
