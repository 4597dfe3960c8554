"""How the attention kernels are launched: geometry, parameters, and the examples that try them."""

from __future__ import annotations

import mlx.core as mx

from mlx_rgemma.ops import kernels
from mlx_rgemma.ops.attention_plain import Ring, plain_rotary
from mlx_rgemma.ops.kernels import SIMD, ceil_div, sample

HEAD_DIMS = range(8, 257)
"""Head sizes that the kernels hold in registers and threadgroup memory."""

EXAMPLE_HEAD_DIMS = (16, 256)
"""Of the test models and of the released ones: what the self-test command goes through."""

ROTARY_THREADS = 256
RING_SIMDGROUPS = 16
RING_GROUPS = 40
"""Threadgroups that keep the cores of a large GPU busy: beyond, heads share their reads."""


def supported(q: mx.array, *others: mx.array) -> bool:
    """Whether the kernels take these arrays: one dtype, a head size they were made for."""
    return q.shape[-1] in HEAD_DIMS and all(x.dtype == q.dtype for x in others)


def launch_window(q, kv, ring, head, window, reach):
    """Arguments as `plain_window`, the ring's arrays and head apart; (B, H, L, head_dim) back."""
    batch, heads, length, head_dim = q.shape
    rows, keys, simdgroups = window_tile(head_dim, q.dtype)
    slots = 0 if ring is None else ring.shape[2]
    reach_stride = 0 if reach is None or reach.shape[0] == 1 else length
    params = [length, heads, slots, head, window]
    params = mx.array([*params, reach_stride, int(reach is not None)], mx.int32)
    (out,) = WINDOW.run(
        # Tokens before heads: as the projections leave the queries and take the output.
        [
            q.swapaxes(1, 2),
            kv,
            kv if ring is None else ring,
            params if reach is None else reach.astype(mx.int32),
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


def window_tile(head_dim: int, dtype: mx.Dtype) -> tuple[int, int, int]:
    """Rows, keys and simdgroups of a threadgroup of the windowed kernel.

    The queries of a tile and one block of its scores must fit 32 KB of threadgroup memory, and the
    output of a simdgroup's slice of the head 64 registers a lane.
    """
    simdgroups = 8 if head_dim > 128 else 4 if head_dim > 32 else 2
    rows = 16 if head_dim > 128 and dtype == mx.float32 else 32
    return rows, 8 * max(simdgroups, 4), simdgroups


def launch_ring(q, k, v, cos, sin, ring, head, window, reach):
    """Arguments as `plain_step`, the ring's arrays and head apart."""
    batch, heads, _, head_dim = q.shape
    share = ring_share(batch, heads)
    pairs = cos.shape[-1]
    angle_stride = 0 if cos.shape[0] == 1 else pairs
    reach_stride = 0 if reach is None or reach.shape[0] == 1 else 1
    params = [heads, ring.shape[2], head, window, pairs, angle_stride, reach_stride]
    params = mx.array([*params, int(reach is not None)], mx.int32)
    return RING.run(
        [q, k, v, cos, sin, ring, params if reach is None else reach.astype(mx.int32), params],
        [(q.shape, q.dtype), ((batch, 2, 1, head_dim), q.dtype)],
        groups=(heads // share, batch, 1),
        threadgroup=(SIMD * RING_SIMDGROUPS, 1, 1),
        template={
            "T": q.dtype,
            "D": head_dim,
            "HEADS": share,
            "SIMDGROUPS": RING_SIMDGROUPS,
        },
    )


def ring_share(batch: int, heads: int) -> int:
    """Heads of a threadgroup of the ring kernel: two, where that leaves enough threadgroups."""
    return 2 if heads % 2 == 0 and batch * heads >= 2 * RING_GROUPS else 1


def launch_rotary(q, k, v, cos, sin):
    """Arguments as `plain_rotary`."""
    batch, heads, length, head_dim = q.shape
    pairs = cos.shape[-1]
    angle_stride = 0 if cos.shape[0] == 1 else length * pairs
    rotated, kv = ROTARY.run(
        [q.swapaxes(1, 2), k, v, cos, sin, mx.array([length, heads, pairs, angle_stride])],
        [((batch, length, heads, head_dim), q.dtype), ((batch, 2, length, head_dim), q.dtype)],
        groups=(ceil_div((heads + 2) * head_dim, ROTARY_THREADS), length, batch),
        threadgroup=(ROTARY_THREADS, 1, 1),
        template={"T": q.dtype, "D": head_dim},
    )
    return [rotated.swapaxes(1, 2), kv]


def exact_window(q, kv, ring, head, window, reach):
    """The definition in fp32, one score for every pair; arguments as `launch_window`.

    Only for small examples: it multiplies and adds one by one, because a GPU may round the
    operands of its matrix products.
    """
    length, head_dim = q.shape[2:]
    slots = 0
    if ring is not None:
        slots = ring.shape[2]
        kv = mx.concatenate([Ring(ring, head).in_order(), kv], axis=2)
    k, v = kv[:, :1].astype(mx.float32), kv[:, 1:].astype(mx.float32)
    distance = (slots + mx.arange(length))[:, None] - mx.arange(slots + length)
    limit = mx.array(window) if reach is None else mx.minimum(reach, window)[:, None, :, None]
    visible = (distance >= 0) & (distance <= limit)
    scores = (q.astype(mx.float32)[..., None, :] * k[:, :, None]).sum(-1) * head_dim**-0.5
    weights = mx.softmax(mx.where(visible, scores, -mx.inf), axis=-1)
    return [(weights[..., None] * v[:, :, None]).sum(-2).astype(q.dtype)]


def exact_step(q, k, v, cos, sin, ring, head, window, reach):
    """Likewise, arguments as `launch_ring`."""
    q, kv = plain_rotary(q, k, v, cos, sin)
    return [*exact_window(q, kv, ring, head, window, reach), kv]


def _example_window(dtype, head_dim):
    heads, length, window = 3, 45, 12
    q = sample((1, heads, length, head_dim), dtype, 1)
    kv = sample((1, 2, length, head_dim), dtype, 2)
    ring = sample((1, 2, window + 1, head_dim), dtype, 3)
    token = mx.arange(length)  # the sequence is 9 tokens old, and a document starts at token 20
    position = mx.where(token < 20, token + 9, token - 20)
    reach = mx.minimum(position, window).astype(mx.int32)[None]
    return q, kv, ring, 5, window, reach


def _example_angles(length, head_dim):
    pairs = max(1, head_dim // 4)
    angle = mx.arange(length * pairs, dtype=mx.float32).reshape(1, 1, length, pairs)
    return mx.cos(angle), mx.sin(angle)


def _example_ring(dtype, head_dim, share):
    window = 75  # more than one round of the threadgroup's simdgroups
    batch, heads = (1, 3) if share == 1 else (2, RING_GROUPS)
    q = sample((batch, heads, 1, head_dim), dtype, 1)
    k = sample((batch, 1, 1, head_dim), dtype, 2)
    v = sample((batch, 1, 1, head_dim), dtype, 3)
    ring = sample((batch, 2, window + 1, head_dim), dtype, 4)
    cos, sin = _example_angles(1, head_dim)
    return q, k, v, cos, sin, ring, 7, window, None


def _example_rotary(dtype, head_dim):
    q = sample((1, 3, 5, head_dim), dtype, 1)
    k = sample((1, 1, 5, head_dim), dtype, 2)
    v = sample((1, 1, 5, head_dim), dtype, 3)
    return q, k, v, *_example_angles(5, head_dim)


_VARIANTS = tuple((dtype, d) for d in EXAMPLE_HEAD_DIMS for dtype in kernels.FLOATS)

WINDOW = kernels.register(
    "windowed_attention",
    inputs=("q", "kv", "ring", "reach", "params"),
    outputs=("out",),
    launch=launch_window,
    reference=exact_window,
    example=_example_window,
    variants=_VARIANTS,
)

RING = kernels.register(
    "ring_attention",
    inputs=("q", "k", "v", "cosine", "sine", "ring", "reach", "params"),
    outputs=("out", "kv"),
    launch=launch_ring,
    reference=exact_step,
    example=_example_ring,
    variants=tuple((*variant, share) for share in (1, 2) for variant in _VARIANTS),
)

ROTARY = kernels.register(
    "rotary",
    inputs=("q", "k", "v", "cosine", "sine", "params"),
    outputs=("rotated", "kv"),
    launch=launch_rotary,
    reference=plain_rotary,
    example=_example_rotary,
    variants=_VARIANTS,
)
