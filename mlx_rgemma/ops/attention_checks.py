"""Argument checks and kernel limits that prefill and decode attention share."""

from __future__ import annotations

import mlx.core as mx

from mlx_rgemma.ops.ring_buffer import RingBuffer

HEAD_DIMS = range(8, 257)
"""Head sizes that the kernels hold in registers and threadgroup memory."""

SAMPLE_HEAD_DIMS = (16, 256)
"""Of the test models and of the released ones: those that the self-test command goes through."""


def fits_kernel(q: mx.array, *others: mx.array | None) -> bool:
    """Return whether the attention kernels take these arrays: one dtype, a supported head size."""
    return q.shape[-1] in HEAD_DIMS and all(x is None or x.dtype == q.dtype for x in others)


def check(
    name: str,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    cos: mx.array,
    sin: mx.array,
    max_lookback: mx.array | None,
    ring: RingBuffer | None,
) -> None:
    """Raise ValueError if shapes do not agree, naming the operation and the array."""
    batch, _, length, head_dim = q.shape
    if k.shape != (batch, 1, length, head_dim) or v.shape != k.shape:
        raise ValueError(
            f"[{name}] q has shape {q.shape}, k {k.shape}, v {v.shape};"
            " k and v must have one head and the rest of q's shape."
        )
    if max_lookback is not None and max_lookback.shape not in ((1, length), (batch, length)):
        raise ValueError(
            f"[{name}] max_lookback has shape {max_lookback.shape},"
            f" expected {(batch, length)} or {(1, length)}."
        )
    if ring is not None:
        slots = ring.kv.shape[2]
        if ring.kv.shape != (batch, 2, slots, head_dim) or not 0 <= ring.write_pos < slots:
            raise ValueError(
                f"[{name}] the ring has shape {ring.kv.shape} and write position {ring.write_pos},"
                f" expected {(batch, 2, 'R', head_dim)} and a position in [0, R)."
            )
    pairs = cos.shape[-1]
    shapes = ((1, 1, length, pairs), (batch, 1, length, pairs))
    if cos.shape not in shapes or sin.shape != cos.shape or 2 * pairs > head_dim:
        raise ValueError(
            f"[{name}] cos has shape {cos.shape}, sin {sin.shape}, expected"
            f" {(batch, 1, length, 'P')} with 2 P <= {head_dim}."
        )
