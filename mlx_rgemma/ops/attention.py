"""Sliding-window attention with one key/value head, over a ring of past keys and a chunk.

One rule says what a query sees: a key lies ``d`` tokens back, and is visible if
``0 <= d <= reach``, where ``reach`` is the smaller of the window and the query's position in its
document. Window, document borders and slots of the ring never written are all that one rule.

One rule says what runs: where `kernels` allows it, all arrays share one float dtype and
``8 <= head_dim <= 256``, it is

* one kernel for a decode step (`ring_step`): rotation, ring and the step's own token,
* one kernel for a chunk (`windowed_attention`), of any length, which holds no scores in memory,
* one kernel for a chunk's rotation, before it (`local_attention`);

everywhere else it is the plain operations of `attention_plain`. Gradients and `mx.vmap` are always
those of the plain operations, which for a chunk of L tokens hold scores of H * 512 * (512 + window)
numbers a row at once.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_rgemma.ops.attention_kernels import (
    RING,
    ROTARY,
    WINDOW,
    launch_ring,
    launch_rotary,
    launch_window,
    ring_share,
    supported,
)
from mlx_rgemma.ops.attention_plain import Ring, plain_ring, plain_rotary, plain_step, plain_window
from mlx_rgemma.ops.fused import run_fused
from mlx_rgemma.ops.rotary import apply_rotary

__all__ = ["Ring", "local_attention", "ring_attention", "ring_step", "windowed_attention"]


def windowed_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    window: int,
    reach: mx.array | None = None,
    ring: Ring | None = None,
) -> mx.array:
    """Attention of a chunk of queries over the chunk and the keys before it.

    What is held at once does not grow with L: there is no L x L array.

    Args:
        q: (B, H, L, head_dim), any float, rotated.
        k, v: (B, 1, L, head_dim); k rotated.
        window: How many past tokens a query sees beside its own.
        reach: (1 or B, L), int32. ``min(window, position in the document)``; None when no document
            starts inside the chunk and the ring (if any) is full.
        ring: The tokens before the chunk; None at the start of a sequence.

    Returns:
        (B, H, L, head_dim), dtype of `q`. The softmax is computed in fp32.

    Raises:
        ValueError: If the shapes do not agree.
    """
    _check("windowed_attention", q, k, v, reach, ring)
    return _window(q, mx.concatenate([k, v], axis=1), ring, window, reach)


def local_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    cos: mx.array,
    sin: mx.array,
    *,
    window: int,
    reach: mx.array | None = None,
    ring: Ring | None = None,
    held: int | None = None,
    last_only: bool = False,
) -> tuple[mx.array, mx.array]:
    """The attention of one call of a layer, rotation included: a whole chunk or a decode step.

    Args:
        q: (B, H, L, head_dim), any float, not rotated. Nothing is copied when it is a view of
            (B, L, H, head_dim), as the projections give it.
        k, v: (B, 1, L, head_dim); k not rotated.
        cos, sin: (1 or B, 1, L, P), fp32, from `rotary_angles`.
        window, reach, ring: As for `windowed_attention`.
        held: ``min(window, position)`` of the first token, where it is known to be the same for all
            rows: the plain form then reads no more of the ring than that.
        last_only: Attend from the last query alone.

    Returns:
        ``(out, kv)``: (B, H, L, head_dim) in the dtype of `q`, L = 1 for `last_only`, and what
        belongs into the ring, the rotated keys and the values, (B, 2, L, head_dim).

    Raises:
        ValueError: If the shapes do not agree.
    """
    if q.shape[2] == 1 and ring is not None:
        out, appended = ring_step(q, k, v, cos, sin, ring, window=window, reach=reach, held=held)
        return out, appended.kv[:, :, ring.head : ring.head + 1]
    _check("local_attention", q, k, v, reach, ring, cos, sin)
    if last_only:
        kv = mx.concatenate([apply_rotary(k, cos, sin), v], axis=1)
        q = apply_rotary(q[:, :, -1:], cos[:, :, -1:], sin[:, :, -1:])
        reach = None if reach is None else reach[:, -1:]
        return plain_window(q, kv, ring, window, reach, held), kv
    q, kv = _rotary(q, k, v, cos, sin)
    return _window(q, kv, ring, window, reach, held), kv


def ring_step(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    cos: mx.array,
    sin: mx.array,
    ring: Ring,
    *,
    window: int,
    reach: mx.array | None = None,
    held: int | None = None,
) -> tuple[mx.array, Ring]:
    """Attention of one token a row over the ring as it was before that token, and the token.

    Keys carry their rotation, so the ring is read as it lies.

    Args:
        q: (B, H, 1, head_dim), any float, not rotated.
        k, v: (B, 1, 1, head_dim); k not rotated.
        cos, sin: (1 or B, 1, 1, P), fp32, from `rotary_angles`.
        ring: The tokens before this one.
        window: How many past tokens a query sees beside its own.
        reach: (1 or B, 1), int32. ``min(window, position)``; None when the whole window is there.
        held: ``min(window, position)`` where it is known to be the same for all rows: the plain
            form then reads no more of the ring than that.

    Returns:
        ``(out, ring)``: (B, H, 1, head_dim) in the dtype of `q`, and the ring with the token in
        place of the oldest; in the same memory, once nobody holds the ring that was given.

    Raises:
        ValueError: If the shapes do not agree.
    """
    _check("ring_step", q, k, v, reach, ring, cos, sin)
    head = ring.head

    def plain(q, k, v, cos, sin, kv, *reach):
        out, appended = plain_step(q, k, v, cos, sin, Ring(kv, head), window, *(reach or (None,)))
        return out, appended.kv[:, :, head : head + 1]

    def launch(q, k, v, cos, sin, kv, *reach):
        return launch_ring(q, k, v, cos, sin, kv, head, window, *(reach or (None,)))

    arrays = [q, k, v, cos, sin, ring.kv, *([] if reach is None else [reach])]
    share = ring_share(*q.shape[:2])
    if supported(q, k, v, ring.kv) and RING.usable(q.dtype, q.shape[-1], share):
        out, kv = run_fused(launch, plain, *arrays)
        return out, ring.appended(kv)
    return plain_step(q, k, v, cos, sin, ring, window, reach, held)


def ring_attention(
    q: mx.array, ring: Ring, *, window: int, reach: mx.array | None = None
) -> mx.array:
    """Attention of one query a row over a ring that already holds the query's own token.

    Plain operations, whose fast form on a GPU is MLX's own: `ring_step` does more in one launch.

    Args:
        q: (B, H, 1, head_dim), any float, rotated.
        ring: The window, the newest token in slot ``head - 1``.
        window: How many past tokens a query sees beside its own.
        reach: (1 or B, 1), int32. ``min(window, position)``; None when every slot is visible.

    Returns:
        (B, H, 1, head_dim), dtype of `q`.
    """
    return plain_ring(q, ring, window, reach)


def _window(
    q: mx.array,
    kv: mx.array,
    ring: Ring | None,
    window: int,
    reach: mx.array | None,
    held: int | None = None,
) -> mx.array:
    head = 0 if ring is None else ring.head

    def split(rest):
        """What stands behind the first arrays -> the ring's arrays, reach."""
        past = None if ring is None else rest[0]
        return past, (None if reach is None else rest[-1])

    def plain(q, kv, *rest):
        past, reach = split(rest)
        before = None if past is None else Ring(past, head)
        return [plain_window(q, kv, before, window, reach, held)]

    def launch(q, kv, *rest):
        past, reach = split(rest)
        return launch_window(q, kv, past, head, window, reach)

    arrays = [q, kv]
    if ring is not None:
        arrays.append(ring.kv)
    fits = supported(q, *arrays) and WINDOW.usable(q.dtype, q.shape[-1])
    if reach is not None:
        arrays.append(reach)
    (out,) = run_fused(launch, plain, *arrays) if fits else plain(*arrays)
    return out


def _rotary(
    q: mx.array, k: mx.array, v: mx.array, cos: mx.array, sin: mx.array
) -> tuple[mx.array, mx.array]:
    if supported(q, k, v) and ROTARY.usable(q.dtype, q.shape[-1]):
        rotated, kv = run_fused(launch_rotary, plain_rotary, q, k, v, cos, sin)
        return rotated, kv
    return plain_rotary(q, k, v, cos, sin)


def _check(
    name: str,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    reach: mx.array | None,
    ring: Ring | None,
    cos: mx.array | None = None,
    sin: mx.array | None = None,
) -> None:
    batch, _, length, head_dim = q.shape
    if k.shape != (batch, 1, length, head_dim) or v.shape != k.shape:
        raise ValueError(
            f"[{name}] q has shape {q.shape}, k {k.shape}, v {v.shape};"
            " k and v must have one head and the rest of q's shape."
        )
    if reach is not None and reach.shape not in ((1, length), (batch, length)):
        raise ValueError(
            f"[{name}] reach has shape {reach.shape}, expected {(batch, length)} or {(1, length)}."
        )
    if ring is not None:
        slots = ring.kv.shape[2]
        if ring.kv.shape != (batch, 2, slots, head_dim) or not 0 <= ring.head < slots:
            raise ValueError(
                f"[{name}] the ring has shape {ring.kv.shape} and head {ring.head}, expected"
                f" {(batch, 2, 'R', head_dim)} and a head in [0, R)."
            )
    if cos is not None and sin is not None:
        pairs = cos.shape[-1]
        shapes = ((1, 1, length, pairs), (batch, 1, length, pairs))
        if cos.shape not in shapes or sin.shape != cos.shape or 2 * pairs > head_dim:
            raise ValueError(
                f"[{name}] cos has shape {cos.shape}, sin {sin.shape}, expected"
                f" {(batch, 1, length, 'P')} with 2 P <= {head_dim}."
            )
