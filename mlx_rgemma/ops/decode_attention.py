"""Attention of one token per sequence over its ring buffer: a decode step.

Kernel: ``metal/decode_attention.metal``: rotation, ring and the step's own token in one launch.
Gradients are the reference's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlx_rgemma.ops import metal
from mlx_rgemma.ops.attention_checks import SAMPLE_HEAD_DIMS, check, fits_kernel
from mlx_rgemma.ops.autograd import with_reference_gradient
from mlx_rgemma.ops.backend import Backend, Operation
from mlx_rgemma.ops.metal import SIMD, MetalKernel, sample
from mlx_rgemma.ops.ring_buffer import RingBuffer
from mlx_rgemma.ops.rotary import apply_rotary, rotate_heads_reference

Attention = Callable[[mx.array, mx.array, mx.array | None], mx.array]


def decode_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    cos: mx.array,
    sin: mx.array,
    ring: RingBuffer,
    *,
    window: int,
    max_lookback: mx.array | None = None,
    cached_len: int | None = None,
) -> tuple[mx.array, RingBuffer]:
    """Attend from one token per sequence to the ring as it was before that token, and to itself.

    Keys are stored rotated, so the ring is read as it lies.

    Args:
        q: (B, H, 1, head_dim), any float, not rotated.
        k, v: (B, 1, 1, head_dim); k not rotated.
        cos, sin: (1 or B, 1, 1, P), fp32, from `rotary_angles`.
        ring: The tokens before this one.
        window: Past tokens that a query sees beside its own.
        max_lookback: (1 or B, 1), int32. ``min(window, position)``; None when the ring is full.
        cached_len: ``min(window, position)`` where it is the same for all sequences: the reference
            then reads no more of the ring than that.

    Returns:
        ``(out, ring)``: (B, H, 1, head_dim) in the dtype of `q`, and the ring with the token in
        place of the oldest; in the same memory if nothing else holds the given ring's.

    Raises:
        ValueError: If the shapes do not agree.
    """
    check("decode_attention", q, k, v, cos, sin, max_lookback, ring)
    out, kv = DECODE_ATTENTION(
        *(q, k, v, cos, sin, ring.kv, max_lookback),
        write_pos=ring.write_pos,
        window=window,
        cached_len=cached_len,
    )
    return out, RingBuffer(kv, (ring.write_pos + 1) % kv.shape[2])


def attention(q: mx.array, kv: mx.array, mask: mx.array | None) -> mx.array:
    """Softmax attention by MLX over keys and values side by side, (B, 2, K, head_dim)."""
    k, v, scale = kv[:, :1], kv[:, 1:], q.shape[-1] ** -0.5
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)


def reference(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    cos: mx.array,
    sin: mx.array,
    ring: mx.array,
    max_lookback: mx.array | None,
    *,
    write_pos: int,
    window: int,
    cached_len: int | None,
    attend: Attention = attention,
) -> tuple[mx.array, mx.array]:
    """Rotate, append the token to the ring, attend to the ring as it then lies, in plain MLX."""
    q, kv = apply_rotary(q, cos, sin), mx.concatenate([apply_rotary(k, cos, sin), v], axis=1)
    before = RingBuffer(ring, write_pos)
    after = before.appended(kv)
    if cached_len is not None and cached_len < after.write_pos:
        # A short sequence lies in one piece, all of it visible.
        return attend(q, after.newest(cached_len + 1), None), after.kv
    read = after
    if ring.shape[2] <= window:  # the slot that the token takes is still visible
        read = RingBuffer(mx.concatenate([before.in_order(), kv], axis=2), 0)
    slots, mask = read.kv.shape[2], None
    if max_lookback is not None or slots > window + 1:
        distance = (read.write_pos - 1 - mx.arange(slots)) % slots
        limit = mx.array(window) if max_lookback is None else max_lookback[:, None, :, None]
        mask = distance <= limit
    return attend(q, read.kv, mask), after.kv


DECODE_ATTENTION = Operation(reference)


def token_reference(*arrays: Any, **options: Any) -> tuple[mx.array, mx.array]:
    """`reference` that returns the token's keys and values, (B, 2, 1, head_dim), not the ring."""
    _, k, v, cos, sin = arrays[:5]
    out, _ = reference(*arrays, **options)
    return out, mx.concatenate([apply_rotary(k, cos, sin), v], axis=1)


def appending(attend: Callable[..., Any]) -> Callable[..., tuple[mx.array, mx.array]]:
    """Make an implementation of a function that returns what `token_reference` returns.

    The gradient of `attend` is the reference's. The token is appended outside of it: a function
    with a custom gradient would hold the ring, which would then be copied at each step.
    """
    run = with_reference_gradient(attend, token_reference)

    def decode(*arrays: mx.array | None, **options: Any) -> tuple[mx.array, mx.array]:
        out, kv = run(*arrays, **options)
        before = RingBuffer(arrays[5], options["write_pos"])  # type: ignore[arg-type]
        return out, before.appended(kv).kv

    return decode


# The Metal kernel.

SIMDGROUPS = 16
THREADGROUPS = 40
"""Threadgroups that keep the cores of a large GPU busy: beyond, heads share their reads."""


def _supports(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    cos: mx.array,
    sin: mx.array,
    ring: mx.array,
    *_rest: Any,
    **_options: Any,
) -> bool:
    variant = q.dtype, q.shape[-1], heads_per_threadgroup(*q.shape[:2])
    return fits_kernel(q, k, v, ring) and KERNEL.validated(*variant)


@DECODE_ATTENTION.implementation(Backend.METAL, supports=_supports, gradient="own")
@appending
def _metal(*arrays: Any, write_pos: int, window: int, cached_len: int) -> Any:
    return tuple(_launch(*[*arrays, write_pos, window]))


def _launch(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    cos: mx.array,
    sin: mx.array,
    ring: mx.array,
    max_lookback: mx.array | None,
    write_pos: int,
    window: int,
) -> Any:
    batch, heads, _, head_dim = q.shape
    share = heads_per_threadgroup(batch, heads)
    pairs = cos.shape[-1]
    angle_stride = 0 if cos.shape[0] == 1 else pairs
    lookback_stride = 0 if max_lookback is None or max_lookback.shape[0] == 1 else 1
    values = [heads, ring.shape[2], write_pos, window, pairs, angle_stride, lookback_stride]
    params = mx.array([*values, int(max_lookback is not None)], mx.int32)
    lookback = params if max_lookback is None else max_lookback.astype(mx.int32)
    return KERNEL.run(
        [q, k, v, cos, sin, ring, lookback, params],
        [(q.shape, q.dtype), ((batch, 2, 1, head_dim), q.dtype)],
        groups=(heads // share, batch, 1),
        threadgroup=(SIMD * SIMDGROUPS, 1, 1),
        template={"T": q.dtype, "D": head_dim, "HEADS": share, "SIMDGROUPS": SIMDGROUPS},
    )


def heads_per_threadgroup(batch: int, heads: int) -> int:
    """Return two where that leaves enough threadgroups, else one."""
    return 2 if heads % 2 == 0 and batch * heads >= 2 * THREADGROUPS else 1


def _definition(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    cos: mx.array,
    sin: mx.array,
    ring: mx.array,
    max_lookback: mx.array | None,
    write_pos: int,
    window: int,
) -> Any:
    """The definition in fp32, one score for every pair, for small samples."""
    head_dim, slots = q.shape[-1], ring.shape[2]
    q, kv = rotate_heads_reference(q, k, v, cos, sin)
    read = mx.concatenate([RingBuffer(ring, write_pos).in_order(), kv], axis=2)
    keys, values = read[:, :1].astype(mx.float32), read[:, 1:].astype(mx.float32)
    limit = mx.array(window)
    if max_lookback is not None:
        limit = mx.minimum(max_lookback, window)[:, None, :, None]
    visible = (slots - mx.arange(slots + 1)) <= limit
    scores = (q.astype(mx.float32)[..., None, :] * keys[:, :, None]).sum(-1) * head_dim**-0.5
    weights = mx.softmax(mx.where(visible, scores, -mx.inf), axis=-1)
    return [(weights[..., None] * values[:, :, None]).sum(-2).astype(q.dtype), kv]


def _sample_inputs(dtype: mx.Dtype, head_dim: int, share: int) -> tuple[Any, ...]:
    window = 75  # more than one round of the threadgroup's simdgroups
    batch, heads = (1, 3) if share == 1 else (2, THREADGROUPS)
    q = sample((batch, heads, 1, head_dim), dtype, 1)
    k = sample((batch, 1, 1, head_dim), dtype, 2)
    v = sample((batch, 1, 1, head_dim), dtype, 3)
    ring = sample((batch, 2, window + 1, head_dim), dtype, 4)
    pairs = max(1, head_dim // 4)
    angle = mx.arange(pairs, dtype=mx.float32).reshape(1, 1, 1, pairs)
    return q, k, v, mx.cos(angle), mx.sin(angle), ring, None, 7, window


KERNEL = MetalKernel(
    "decode_attention",
    inputs=("q", "k", "v", "cosine", "sine", "ring", "max_lookback", "params"),
    outputs=("out", "kv"),
    launch=_launch,
    reference=_definition,
    sample_inputs=_sample_inputs,
    variants=tuple(
        (dtype, d, share) for share in (1, 2) for d in SAMPLE_HEAD_DIMS for dtype in metal.FLOATS
    ),
)
