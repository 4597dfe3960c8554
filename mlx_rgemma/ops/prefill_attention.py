"""Sliding-window attention of a chunk of tokens, over the chunk and the ring of keys before it.

One rule says which keys a query sees: a key ``d`` tokens back is visible if
``0 <= d <= max_lookback``, the smaller of the window and the query's position in its document. That
covers the window, document borders and ring slots never written.

Kernel: ``metal/prefill_attention.metal``, which holds no scores in memory. Gradients are the
reference's, which holds H * QUERY_BLOCK * (QUERY_BLOCK + window) scores per sequence at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlx_rgemma.ops import metal
from mlx_rgemma.ops.attention_checks import SAMPLE_HEAD_DIMS, check, fits_kernel
from mlx_rgemma.ops.backend import Backend, Operation
from mlx_rgemma.ops.decode_attention import decode_attention
from mlx_rgemma.ops.metal import SIMD, MetalKernel, ceil_div, sample
from mlx_rgemma.ops.ring_buffer import RingBuffer
from mlx_rgemma.ops.rotary import apply_rotary, rotate_heads

QUERY_BLOCK = 512
"""Queries that the reference handles at once."""

Mask = mx.array | str | None
Attention = Callable[[mx.array, mx.array, Mask], mx.array]


def prefill_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    cos: mx.array,
    sin: mx.array,
    *,
    window: int,
    max_lookback: mx.array | None = None,
    ring: RingBuffer | None = None,
    cached_len: int | None = None,
    last_only: bool = False,
) -> tuple[mx.array, mx.array]:
    """Rotate a chunk's queries and keys, and attend.

    No L x L array is made: temporaries do not grow with L.

    Args:
        q: (B, H, L, head_dim), any float, not rotated. Nothing is copied when it is a view of
            (B, L, H, head_dim), as the projections give it.
        k, v: (B, 1, L, head_dim); k not rotated.
        cos, sin: (1 or B, 1, L, P), fp32, from `rotary_angles`.
        window: Past tokens that a query sees beside its own.
        max_lookback: (1 or B, L), int32. ``min(window, position in the document)``; None when no
            document starts inside the chunk and the ring (if any) is full.
        ring: The tokens before the chunk; None at the start of a sequence.
        cached_len: ``min(window, position)`` of the first token, where it is the same for all
            sequences: the reference then reads no more of the ring than that.
        last_only: Attend from the last query alone.

    Returns:
        ``(out, kv)``: (B, H, L, head_dim) in the dtype of `q`, L = 1 for `last_only`, and the
        rotated keys and the values for the ring, (B, 2, L, head_dim). The softmax is in fp32.

    Raises:
        ValueError: If the shapes do not agree.
    """
    if q.shape[2] == 1 and ring is not None:
        out, appended = decode_attention(
            *(q, k, v, cos, sin, ring),
            window=window,
            max_lookback=max_lookback,
            cached_len=cached_len,
        )
        return out, appended.kv[:, :, ring.write_pos : ring.write_pos + 1]
    check("prefill_attention", q, k, v, cos, sin, max_lookback, ring)
    past, write_pos = (None, 0) if ring is None else ring
    if last_only:
        kv = mx.concatenate([apply_rotary(k, cos, sin), v], axis=1)
        q = apply_rotary(q[:, :, -1:], cos[:, :, -1:], sin[:, :, -1:])
        max_lookback = None if max_lookback is None else max_lookback[:, -1:]
    else:
        q, kv = rotate_heads(q, k, v, cos, sin)
    options = {"write_pos": write_pos, "window": window, "cached_len": cached_len}
    return PREFILL_ATTENTION(q, kv, past, max_lookback, **options), kv


def reference(
    q: mx.array,
    kv: mx.array,
    ring: mx.array | None,
    max_lookback: mx.array | None,
    *,
    write_pos: int,
    window: int,
    cached_len: int | None,
) -> mx.array:
    """Attend in plain MLX: rotated q (B, H, L, head_dim), kv (B, 2, L, head_dim) of the chunk.

    The queries are those of the last tokens; there may be fewer.
    """
    kv = with_past(kv, ring, write_pos, window, cached_len)
    return blockwise(q, kv, window, max_lookback, QUERY_BLOCK, attention)


PREFILL_ATTENTION = Operation(reference)


def with_past(
    kv: mx.array, ring: mx.array | None, write_pos: int, window: int, cached_len: int | None
) -> mx.array:
    """Return keys and values of the ring's tokens and the chunk's, oldest first."""
    if ring is None:
        return kv
    past = min(ring.shape[2], window if cached_len is None else min(cached_len, window))
    return mx.concatenate([RingBuffer(ring, write_pos).newest(past), kv], axis=2)


def blockwise(
    q: mx.array,
    kv: mx.array,
    window: int,
    max_lookback: mx.array | None,
    block: int,
    attend: Attention,
) -> mx.array:
    """Attend in blocks of queries, each over the slice of keys that it can see."""
    length = q.shape[2]
    before = kv.shape[2] - length
    outputs = []
    for first in range(0, length, block):
        last = min(first + block, length)
        oldest = max(0, before + first - window)
        lookback = None if max_lookback is None else max_lookback[:, first:last]
        mask = window_mask(before + first, last - first, oldest, before + last, window, lookback)
        outputs.append(attend(q[:, :, first:last], kv[:, :, oldest : before + last], mask))
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)


def attention(q: mx.array, kv: mx.array, mask: Mask) -> mx.array:
    """Softmax attention by MLX over keys and values side by side, (B, 2, K, head_dim)."""
    k, v, scale = kv[:, :1], kv[:, 1:], q.shape[-1] ** -0.5
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)


def window_mask(
    first_query: int,
    queries: int,
    first_key: int,
    end_key: int,
    window: int,
    max_lookback: mx.array | None,
) -> Mask:
    """Return which keys each query sees, as MLX's attention takes it: (1 or B, 1, q, k) bool."""
    if queries == 1 and max_lookback is None:
        return None
    from_start = first_key == 0 and first_query == 0 and end_key <= window + 1
    if max_lookback is None and from_start:
        return "causal"
    query = mx.arange(first_query, first_query + queries)[:, None]
    distance = query - mx.arange(first_key, end_key)
    limit = mx.array(window) if max_lookback is None else max_lookback[:, None, :, None]
    return (distance >= 0) & (distance <= limit)


# The Metal kernel.


def _supports(
    q: mx.array, kv: mx.array, ring: mx.array | None, max_lookback: mx.array | None, **_options: Any
) -> bool:
    whole_chunk = q.shape[2] == kv.shape[2]
    return whole_chunk and fits_kernel(q, kv, ring) and KERNEL.validated(q.dtype, q.shape[-1])


@PREFILL_ATTENTION.implementation(Backend.METAL, supports=_supports)
def _metal(
    q: mx.array,
    kv: mx.array,
    ring: mx.array | None,
    max_lookback: mx.array | None,
    *,
    write_pos: int,
    window: int,
    cached_len: int,
) -> Any:
    return _launch(q, kv, ring, max_lookback, write_pos, window)[0]


def _launch(
    q: mx.array,
    kv: mx.array,
    ring: mx.array | None,
    max_lookback: mx.array | None,
    write_pos: int,
    window: int,
) -> Any:
    batch, heads, length, head_dim = q.shape
    rows, keys, simdgroups = tile(head_dim, q.dtype)
    slots = 0 if ring is None else ring.shape[2]
    lookback_stride = 0 if max_lookback is None or max_lookback.shape[0] == 1 else length
    values = [length, heads, slots, write_pos, window]
    params = mx.array([*values, lookback_stride, int(max_lookback is not None)], mx.int32)
    (out,) = KERNEL.run(
        # Tokens before heads: as the projections leave the queries and take the output.
        [
            q.swapaxes(1, 2),
            kv,
            kv if ring is None else ring,
            params if max_lookback is None else max_lookback.astype(mx.int32),
            params,
        ],
        [((batch, length, heads, head_dim), q.dtype)],
        groups=(ceil_div(length * heads, rows), batch, 1),
        threadgroup=(SIMD * simdgroups, 1, 1),
        template={
            "T": q.dtype,
            "D": head_dim,
            "ROWS": rows,
            "KEYS": keys,
            "SIMDGROUPS": simdgroups,
        },
    )
    return [out.swapaxes(1, 2)]


def tile(head_dim: int, dtype: mx.Dtype) -> tuple[int, int, int]:
    """Return rows, keys and simdgroups of a threadgroup.

    The queries of a tile and one block of its scores must fit 32 KB of threadgroup memory, and the
    output of a simdgroup's slice of the head 64 registers per lane.
    """
    simdgroups = 8 if head_dim > 128 else 4 if head_dim > 32 else 2
    rows = 16 if head_dim > 128 and dtype == mx.float32 else 32
    return rows, 8 * max(simdgroups, 4), simdgroups


def definition(
    q: mx.array,
    kv: mx.array,
    ring: mx.array | None,
    max_lookback: mx.array | None,
    write_pos: int,
    window: int,
) -> Any:
    """The definition in fp32, one score for every pair; arguments as `_launch`.

    Only for small samples: it multiplies and adds one by one, because a GPU may round the operands
    of its matrix products.
    """
    length, head_dim = q.shape[2:]
    slots = 0
    if ring is not None:
        slots = ring.shape[2]
        kv = mx.concatenate([RingBuffer(ring, write_pos).in_order(), kv], axis=2)
    k, v = kv[:, :1].astype(mx.float32), kv[:, 1:].astype(mx.float32)
    distance = (slots + mx.arange(length))[:, None] - mx.arange(slots + length)
    limit = mx.array(window)
    if max_lookback is not None:
        limit = mx.minimum(max_lookback, window)[:, None, :, None]
    visible = (distance >= 0) & (distance <= limit)
    scores = (q.astype(mx.float32)[..., None, :] * k[:, :, None]).sum(-1) * head_dim**-0.5
    weights = mx.softmax(mx.where(visible, scores, -mx.inf), axis=-1)
    return [(weights[..., None] * v[:, :, None]).sum(-2).astype(q.dtype)]


def _sample_inputs(dtype: mx.Dtype, head_dim: int) -> tuple[Any, ...]:
    heads, length, window = 3, 45, 12
    q = sample((1, heads, length, head_dim), dtype, 1)
    kv = sample((1, 2, length, head_dim), dtype, 2)
    ring = sample((1, 2, window + 1, head_dim), dtype, 3)
    token = mx.arange(length)  # the sequence is 9 tokens old, and a document starts at token 20
    position = mx.where(token < 20, token + 9, token - 20)
    max_lookback = mx.minimum(position, window).astype(mx.int32)[None]
    return q, kv, ring, max_lookback, 5, window


KERNEL = MetalKernel(
    "prefill_attention",
    inputs=("q", "kv", "ring", "max_lookback", "params"),
    outputs=("out",),
    launch=_launch,
    reference=definition,
    sample_inputs=_sample_inputs,
    variants=tuple((dtype, d) for d in SAMPLE_HEAD_DIMS for dtype in metal.FLOATS),
)
