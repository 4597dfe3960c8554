"""Attention of a block of queries on a Linux CPU, where a softmax weighs more than the products.

All heads read the same keys: their queries are the rows of one matrix product. The softmax takes
powers of two (see `exponential`), its divisor comes out of the product with the values, and a bias
hides keys, since selecting costs more than adding. The backward pass keeps no probabilities: they
are computed again from the logarithm of each row's divisor (FlashAttention, arXiv:2205.14135,
algorithm 4).
"""

from __future__ import annotations

import math

import mlx.core as mx

from mlx_rgemma.ops.exponential import LOG2_E, exp2
from mlx_rgemma.ops.fused import custom_function
from mlx_rgemma.ops.linear import BLOCK_PRODUCTS
from mlx_rgemma.ops.sums import long_sum

HIDDEN = -1e30
_ALL_SEEN = mx.array([[[[0.0]]]])
MOST_ROWS = 32
"""Queries of all heads up to which the keys are read in place."""


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
    bias = _ALL_SEEN
    if mask is not None:
        bias = (mask.astype(mx.float32) - 1.0) * -HIDDEN
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
    if q.shape[1] <= MOST_ROWS:
        return _attend_few(q, k, v, bias)
    scores = _biased(q @ k.swapaxes(1, 2), bias)
    top = scores.max(axis=-1, keepdims=True)
    powers = exp2(scores - top)
    total = long_sum(powers)
    return powers @ v / total, top + mx.log(total) * LOG2_E


def _attend_few(q, k, v, bias):
    """The same for a decode step: a column of scores each, from keys that are read as they lie.

    The keys are cut into equal blocks, and a rest, for products that the BLAS computes in place and
    on one thread: a second one would spin until the next token.
    """
    batch, number, _ = k.shape
    size, even = _blocks(number, q.shape[1] * q.shape[2])

    def cut(z: mx.array) -> mx.array:
        return z[:, :even].reshape(batch, -1, size, z.shape[2])

    columns = mx.contiguous(q.swapaxes(1, 2))
    scores = (cut(k) @ columns[:, None]).reshape(batch, even, -1)
    if even < number:
        scores = mx.concatenate([scores, k[:, even:] @ columns], axis=1)
    scores = _biased_columns(scores, bias)
    top = scores.max(axis=1, keepdims=True)
    powers = exp2(scores - top)
    sums = (cut(powers).swapaxes(2, 3) @ cut(v)).sum(axis=1)
    if even < number:
        sums = sums + powers[:, even:].swapaxes(1, 2) @ v[:, even:]
    total = long_sum(powers.swapaxes(1, 2)).swapaxes(1, 2)
    log_total = top + mx.log(total) * LOG2_E
    return sums / total.swapaxes(1, 2), log_total.swapaxes(1, 2)


def _blocks(keys: int, products: int) -> tuple[int, int]:
    """Keys of a block, so many products each, and of all blocks together: all but a small rest."""
    least = -(-keys * products // BLOCK_PRODUCTS)
    without_rest = (number for number in range(least, 2 * least) if keys % number == 0)
    size = max(keys // next(without_rest, least), 1)
    return size, keys // size * size


@_attend.vjp
def _attend_vjp(primals, cotangents, outputs):
    (q, k, v, bias), (out, log_total), dy = primals, outputs, cotangents[0]
    shares = exp2(_biased(q @ k.swapaxes(1, 2), bias) - log_total)
    dv = shares.swapaxes(1, 2) @ dy
    delta = (dy * out).sum(axis=-1, keepdims=True)
    d_scores = shares * ((dy @ v.swapaxes(1, 2) - delta) * math.log(2.0))
    return d_scores @ k, d_scores.swapaxes(1, 2) @ q, dv, mx.zeros_like(bias)


def _biased(scores: mx.array, bias: mx.array) -> mx.array:
    if bias.size == 1:
        return scores
    batch, rows, keys = scores.shape
    heads = rows // bias.shape[2]
    return (scores.reshape(batch, heads, -1, keys) + bias).reshape(scores.shape)


def _biased_columns(scores: mx.array, bias: mx.array) -> mx.array:
    if bias.size == 1:
        return scores
    batch, keys, rows = scores.shape
    heads = rows // bias.shape[2]
    return (scores.reshape(batch, keys, heads, -1) + bias.moveaxis(3, 1)).reshape(scores.shape)
