"""Attention of a block of queries on a Linux CPU, where a softmax weighs more than the products.

All heads read the same keys: their queries are the rows of one matrix product. The softmax takes
powers of two (see `exponential`), its divisor comes out of the product with the values, and a bias
hides keys, since selecting costs more than adding. The backward pass keeps no probabilities: they
are computed again from the logarithm of each row's divisor (FlashAttention, arXiv:2205.14135,
algorithm 4).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import mlx.core as mx

from mlx_rgemma.ops.exponential import LOG2_E, exp2
from mlx_rgemma.ops.fused import custom_function
from mlx_rgemma.ops.linear import BLOCK_OUTPUTS, BLOCK_PRODUCTS

HIDDEN = -1e30
MOST_ROWS = 32
"""Queries of all heads up to which the keys are read in place."""
ALONE = 1 << 18
"""Products up to which OpenBLAS wakes no second thread, which would then spin for a while."""


def attend(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None) -> mx.array:
    """Softmax attention over one key/value head.

    Args:
        q: (B, H, L, head_dim), any float.
        k, v: (B, 1, K, head_dim).
        scale: Of the products of queries and keys.
        mask: (1 or B, 1, L, K) or (L, K), bool. What each query sees, one key at least; None: all.

    Returns:
        (B, H, L, head_dim), dtype of `q`.
    """
    batch, heads, length, _ = q.shape
    bias = mx.zeros((1, 1, 1, 1)) if mask is None else (mask.astype(mx.float32) - 1.0) * -HIDDEN
    bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
    scaled = (q.astype(mx.float32) * (scale * LOG2_E)).reshape(batch, heads * length, -1)
    k, v = k[:, 0].astype(mx.float32), v[:, 0].astype(mx.float32)
    out = _attend(scaled, k, v, bias)[0]
    return out.reshape(q.shape).astype(q.dtype)


@custom_function
def _attend(q, k, v, bias):
    """q (B, H L, N), scaled; k, v (B, K, N); bias (1 or B, 1, 1 or L, K or 1); all fp32.

    -> (B, H L, N), and the base-2 logarithm of each row's sum of powers (B, H L, 1).
    """
    scores = _scores(q, k, bias)
    top = scores.max(axis=-1, keepdims=True)
    powers = exp2(scores - top)
    if q.shape[1] < v.shape[2]:
        sums, total = _weighted(powers, v), powers.sum(axis=-1, keepdims=True)
    else:
        sums = powers @ mx.concatenate([v, mx.ones((*v.shape[:2], 1))], axis=-1)
        sums, total = sums[..., :-1], sums[..., -1:]
    return sums / total, top + mx.log(total) * LOG2_E


@_attend.vjp
def _attend_vjp(primals, cotangents, outputs):
    (q, k, v, bias), (out, log_total), dy = primals, outputs, cotangents[0]
    shares = exp2(_scores(q, k, bias) - log_total)
    dv = shares.swapaxes(1, 2) @ dy
    delta = (dy * out).sum(axis=-1, keepdims=True)
    d_scores = shares * ((dy @ v.swapaxes(1, 2) - delta) * math.log(2.0))
    return d_scores @ k, d_scores.swapaxes(1, 2) @ q, dv, mx.zeros_like(bias)


def _scores(q: mx.array, k: mx.array, bias: mx.array) -> mx.array:
    scores = _products(q, k)
    if bias.size == 1:
        return scores
    batch, rows, keys = scores.shape
    heads = rows // bias.shape[2]
    return (scores.reshape(batch, heads, -1, keys) + bias).reshape(scores.shape)


def _products(q: mx.array, k: mx.array) -> mx.array:
    """``q @ k^T``, for a decode step in parts that the BLAS multiplies in place, by one thread."""
    parts = [q @ k[:, first:end].swapaxes(1, 2) for first, end in _parts(q, k, ALONE)]
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)


def _weighted(powers: mx.array, v: mx.array) -> mx.array:
    """``powers @ v``, in such parts."""
    parts = _parts(powers, v, BLOCK_PRODUCTS)
    first, *others = [powers[..., first:end] @ v[:, first:end] for first, end in parts]
    for part in others:
        first = first + part
    return first


def _parts(rows: mx.array, keys: mx.array, products: int) -> Iterator[tuple[int, int]]:
    number, width = keys.shape[1:]
    few = rows.shape[1] <= MOST_ROWS
    most = min(BLOCK_OUTPUTS, products // (rows.shape[1] * width)) if few else number
    step = -(-number // -(-number // max(most, 1)))
    for first in range(0, number, step):
        yield first, min(first + step, number)
