"""Softmax attention with products by NumPy, and prefill attention by a Numba kernel.

All heads read the same keys, so their queries are the rows of one matrix product. The backward pass
keeps no probabilities: they are computed again from the logarithm of each row's denominator
(FlashAttention, arXiv:2205.14135, algorithm 4).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rgemma.cpu import numba_runtime
from mlx_rgemma.cpu.arrays import View, empty, ignore_overflow, materialize
from mlx_rgemma.cpu.fastmath import LOG2_E
from mlx_rgemma.ops.backend import Backend
from mlx_rgemma.ops.decode_attention import DECODE_ATTENTION, appending, token_reference
from mlx_rgemma.ops.prefill_attention import PREFILL_ATTENTION, Mask, blockwise, with_past
from mlx_rgemma.ops.rotary import rotate_heads_reference

QUERY_BLOCK = 128
"""Queries handled at once: masked scores cost as much as visible ones."""

MIN_PRODUCTS = 1 << 19
"""Multiplications of a decode step from which on NumPy is faster."""

MASK_VALUE = np.float32(-1e30)

CHANNELS = 32
"""Heads are padded to a multiple of it for the Numba kernel: the columns of a tile."""


def attend(q: mx.array, kv: mx.array, mask: Mask) -> mx.array:
    """Softmax attention over one key/value head.

    Args:
        q: (B, H, L, head_dim), any float.
        kv: (B, 2, K, head_dim). Keys and values.
        mask: (1 or B, 1, L, K) or (L, K), bool. The keys that each query sees, at least one; None
            for all, "causal" for those up to the query's own.

    Returns:
        (B, H, L, head_dim), dtype of `q`.
    """
    length, keys = q.shape[2], kv.shape[2]
    if isinstance(mask, str):
        own = mx.arange(keys - length, keys)[:, None]
        mask = own >= mx.arange(keys)
    mask = mx.array([[[[True]]]]) if mask is None else mask
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    results: Any = _attend(q, kv, mask)
    out: mx.array = results[0]
    return out


@mx.custom_function
@ignore_overflow
def _attend(q: mx.array, kv: mx.array, mask: mx.array) -> tuple[mx.array, mx.array]:
    """-> the output, and the logarithm of each row's denominator, (B, H L, 1)."""
    views = materialize(q, kv, mask)
    if views is None:
        scale = q.shape[-1] ** -0.5
        out = mx.fast.scaled_dot_product_attention(q, kv[:, :1], kv[:, 1:], scale=scale, mask=mask)
        return out, mx.zeros((q.shape[0], q.shape[1] * q.shape[2], 1))
    k, v = views[1][:, 0], views[1][:, 1]
    scores = _scores(views[0], k, views[2])
    row_max = scores.max(axis=-1, keepdims=True)
    scores -= row_max
    np.exp(scores, out=scores)
    row_sum = scores.sum(axis=-1, keepdims=True)
    out, view = empty((q.shape[0], q.shape[1] * q.shape[2], q.shape[3]))
    np.matmul(scores, v, out=view)
    view /= row_sum
    return out.reshape(q.shape).astype(q.dtype), mx.array(row_max + np.log(row_sum))


@_attend.vjp
@ignore_overflow
def _attend_vjp(primals: Any, cotangents: Any, outputs: Any) -> Any:
    q, kv, mask = primals
    views = materialize(q, kv, mask, *outputs, cotangents[0])
    if views is None:
        return mx.vjp(partial(_differentiable, mask=mask), [q, kv], [cotangents[0]])[1] + [
            mx.zeros_like(mask)
        ]
    scale = np.float32(q.shape[-1] ** -0.5)
    k, v = views[1][:, 0], views[1][:, 1]
    out, dy = (view.reshape(q.shape[0], -1, q.shape[3]) for view in (views[3], views[5]))
    shares = _scores(views[0], k, views[2])
    shares -= views[4]
    np.exp(shares, out=shares)
    dkv, dkv_view = empty(kv.shape)
    np.matmul(shares.swapaxes(1, 2), dy, out=dkv_view[:, 1])
    d_scores = np.matmul(dy, v.swapaxes(1, 2))
    d_scores -= (dy * out).sum(axis=-1, keepdims=True)
    d_scores *= shares
    d_scores *= scale
    dq, dq_view = empty(out.shape)
    np.matmul(d_scores, k, out=dq_view)
    np.matmul(d_scores.swapaxes(1, 2), views[0].reshape(out.shape), out=dkv_view[:, 0])
    return dq.reshape(q.shape).astype(q.dtype), dkv.astype(kv.dtype), mx.zeros_like(mask)


def _differentiable(q: mx.array, kv: mx.array, mask: mx.array) -> mx.array:
    scale = q.shape[-1] ** -0.5
    return mx.fast.scaled_dot_product_attention(q, kv[:, :1], kv[:, 1:], scale=scale, mask=mask)


def _scores(q: View, k: View, mask: View) -> View:
    """Scaled and masked scores, (B, H L, K)."""
    batch, heads, length, dim = q.shape
    rows = q.reshape(batch, heads * length, dim) * np.float32(dim**-0.5)
    scores = np.matmul(rows, k.swapaxes(1, 2))
    if not mask.all():
        by_head = scores.reshape(batch, heads, length, -1)
        by_head += np.where(mask, np.float32(0.0), MASK_VALUE)
    return scores


def _is_large(
    q: Any, k: Any, v: Any, cos: Any, sin: Any, ring: mx.array, *_: Any, **o: Any
) -> bool:
    return q.shape[1] * ring[0].size >= MIN_PRODUCTS


@DECODE_ATTENTION.implementation(Backend.CPU, supports=_is_large, gradient="own")
@appending
@ignore_overflow
def decode(
    *arrays: Any, write_pos: int, window: int, cached_len: int | None
) -> tuple[mx.array, mx.array]:
    """Attend to the ring, without writing to it, and to the new token.

    To evaluate the ring with the token appended would copy it: its owner still holds the old one.
    """
    q, k, v, cos, sin, ring, max_lookback = arrays
    rotated, kv = rotate_heads_reference(q, k, v, cos, sin)
    visible = mx.array([[window]]) if max_lookback is None else max_lookback
    views = materialize(rotated, kv, ring, visible)
    if views is None:
        options = {"write_pos": write_pos, "window": window, "cached_len": cached_len}
        return token_reference(*arrays, **options)
    past, slots = views[2], views[2].shape[2]
    mask = np.ones(1, bool)
    if cached_len is not None and cached_len <= min(write_pos, window):
        past = past[:, :, write_pos - cached_len : write_pos]
    else:
        distance = slots - (np.arange(slots) - write_pos) % slots
        mask = distance <= np.minimum(views[3], window)[:, None, None]
    batch, heads, _, dim = q.shape
    rows = views[0].reshape(batch, heads, dim) * np.float32(dim**-0.5)
    own = np.matmul(rows, views[1][:, 0].swapaxes(1, 2))
    scores = _scores(views[0], past[:, 0], mask)
    row_max = np.maximum(own, scores.max(axis=-1, keepdims=True, initial=MASK_VALUE))
    own, scores = np.exp(own - row_max), np.exp(scores - row_max)
    row_sum = own + scores.sum(axis=-1, keepdims=True)
    out, view = empty((batch, heads, dim))
    np.matmul(scores, past[:, 1], out=view)
    view += own * views[1][:, 1]
    view /= row_sum
    return out.reshape(q.shape).astype(q.dtype), kv


@PREFILL_ATTENTION.implementation(Backend.CPU, supports=numba_runtime.is_long, gradient="none")
def numba_prefill(
    q: mx.array,
    kv: mx.array,
    ring: mx.array | None,
    max_lookback: mx.array | None,
    *,
    write_pos: int,
    window: int,
    cached_len: int | None,
) -> Any:
    batch, heads, length, dim = q.shape
    kv = with_past(kv, ring, write_pos, window, cached_len)
    lookback = mx.full((1, length), window, mx.int32) if max_lookback is None else max_lookback
    views = materialize(_padded(q), _padded(kv), lookback)
    if views is None:
        return NotImplemented
    own = np.arange(kv.shape[2] - length, kv.shape[2])
    low = np.maximum(own - np.minimum(views[2], window), 0)
    low = np.ascontiguousarray(np.broadcast_to(low, (batch, length)).astype(np.int32))
    out, view = empty((batch, length, heads, views[0].shape[-1]))
    items = batch * heads * -(-length // numba_runtime.constant("QUERIES"))
    scale = np.float32(dim**-0.5 * LOG2_E)
    numba_runtime.run("sliding_window_attention", items, *views[:2], low, scale, view)
    return out[..., :dim].swapaxes(1, 2).astype(q.dtype)


def _padded(x: mx.array) -> mx.array:
    missing = -x.shape[-1] % CHANNELS
    return mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x


@PREFILL_ATTENTION.implementation(Backend.CPU, gradient="own")
def prefill(
    q: mx.array,
    kv: mx.array,
    ring: mx.array | None,
    max_lookback: mx.array | None,
    *,
    write_pos: int,
    window: int,
    cached_len: int | None,
) -> mx.array:
    kv = with_past(kv, ring, write_pos, window, cached_len)
    return blockwise(q, kv, window, max_lookback, QUERY_BLOCK, attend)
