"""Rotary position embedding that stays exact at any position.

A float32 angle ``position * frequency`` is off by 0.06 rad at a million tokens. Here the angle is
a 64-bit fixed-point fraction of a turn: the product wraps around exactly where a full turn does, so
reducing the angle modulo 2 pi costs nothing and loses nothing.

Kernel: ``metal/rotary.metal``, for the heads of a chunk. Gradients are the reference's.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rgemma.ops import metal
from mlx_rgemma.ops.attention_checks import SAMPLE_HEAD_DIMS, fits_kernel
from mlx_rgemma.ops.backend import Backend, Operation
from mlx_rgemma.ops.metal import MetalKernel, ceil_div, sample


def rotary_frequencies(dims: int, theta: float) -> mx.array:
    """Return the turns per position of each pair of channels: (dims / 2,) uint64, unit 2^-64 turn.

    Pair j turns by ``theta^(-2j / dims)`` rad per position (RoFormer, arXiv:2104.09864, eq. 15).
    """
    turns = theta ** (-np.arange(0, dims, 2, dtype=np.float64) / dims) / (2.0 * math.pi)
    return mx.array(np.array([int(t * 2.0**64) for t in turns], dtype=np.uint64))


def rotary_angles(positions: mx.array, frequencies: mx.array) -> tuple[mx.array, mx.array]:
    """Return cosine and sine of each position's angles.

    Args:
        positions: (B, L), int, any size.
        frequencies: (P,), uint64, from `rotary_frequencies`.

    Returns:
        ``(cos, sin)``, each (B, 1, L, P) fp32.
    """
    phase = positions.astype(mx.uint64)[:, None, :, None] * frequencies
    # The upper half, read as a signed number, is the angle in [-pi, pi): unit 2^-32 turn.
    signed = (phase >> mx.array(32, mx.uint64)).astype(mx.uint32).view(mx.int32)
    angle = signed.astype(mx.float32) * (2.0 * math.pi / 2.0**32)
    return mx.cos(angle), mx.sin(angle)


def apply_rotary(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Rotate the first ``2 P`` channels of each head; the others pass through.

    Channel j is paired with channel ``j + P`` (halves, not neighbours). Computed in fp32.

    Args:
        x: (B, H, L, head_dim), any float.
        cos, sin: (B, 1, L, P), fp32, from `rotary_angles`.

    Returns:
        The rotated heads, shape and dtype of `x`.
    """
    pairs = cos.shape[-1]
    first = x[..., :pairs].astype(mx.float32)
    second = x[..., pairs : 2 * pairs].astype(mx.float32)
    rotated = mx.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    ).astype(x.dtype)
    return mx.concatenate([rotated, x[..., 2 * pairs :]], axis=-1)


def rotate_heads_reference(
    q: mx.array, k: mx.array, v: mx.array, cos: mx.array, sin: mx.array
) -> tuple[mx.array, mx.array]:
    """Return the rotated queries, and the rotated keys with their values: (B, 2, L, head_dim)."""
    return apply_rotary(q, cos, sin), mx.concatenate([apply_rotary(k, cos, sin), v], axis=1)


rotate_heads = Operation(rotate_heads_reference)


# The Metal kernel.

THREADS = 256


def _supports(q: mx.array, k: mx.array, v: mx.array, cos: mx.array, sin: mx.array) -> bool:
    return fits_kernel(q, k, v) and KERNEL.validated(q.dtype, q.shape[-1])


@rotate_heads.implementation(Backend.METAL, supports=_supports)
def _metal(q: mx.array, k: mx.array, v: mx.array, cos: mx.array, sin: mx.array) -> Any:
    return tuple(_launch(q, k, v, cos, sin))


def _launch(q: mx.array, k: mx.array, v: mx.array, cos: mx.array, sin: mx.array) -> Any:
    batch, heads, length, head_dim = q.shape
    pairs = cos.shape[-1]
    angle_stride = 0 if cos.shape[0] == 1 else length * pairs
    rotated, kv = KERNEL.run(
        [q.swapaxes(1, 2), k, v, cos, sin, mx.array([length, heads, pairs, angle_stride])],
        [((batch, length, heads, head_dim), q.dtype), ((batch, 2, length, head_dim), q.dtype)],
        groups=(ceil_div((heads + 2) * head_dim, THREADS), length, batch),
        threadgroup=(THREADS, 1, 1),
        template={"T": q.dtype, "D": head_dim},
    )
    return [rotated.swapaxes(1, 2), kv]


def _sample_inputs(dtype: mx.Dtype, head_dim: int) -> tuple[Any, ...]:
    length, pairs = 5, max(1, head_dim // 4)
    q = sample((1, 3, length, head_dim), dtype, 1)
    k = sample((1, 1, length, head_dim), dtype, 2)
    v = sample((1, 1, length, head_dim), dtype, 3)
    angle = mx.arange(length * pairs, dtype=mx.float32).reshape(1, 1, length, pairs)
    return q, k, v, mx.cos(angle), mx.sin(angle)


KERNEL = MetalKernel(
    "rotary",
    inputs=("q", "k", "v", "cosine", "sine", "params"),
    outputs=("rotated", "kv"),
    launch=_launch,
    reference=rotate_heads_reference,
    sample_inputs=_sample_inputs,
    variants=tuple((dtype, d) for d in SAMPLE_HEAD_DIMS for dtype in metal.FLOATS),
)
