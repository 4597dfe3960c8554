"""Rotary position embedding that stays exact at any position.

A float32 angle ``position * frequency`` is off by 0.06 rad at a million tokens. Here the angle is
counted in turns, as a 64-bit fixed-point fraction: the product wraps around exactly where a full
turn does, so that reducing the angle modulo 2 pi costs nothing and loses nothing.
"""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np


def rotary_frequencies(dims: int, theta: float) -> mx.array:
    """Turns a position of each of the ``dims / 2`` pairs, (dims / 2,) uint64, unit 2^-64 turn.

    Pair j turns by ``theta^(-2j / dims)`` rad a position (RoFormer, arXiv:2104.09864, eq. 15).
    """
    turns = theta ** (-np.arange(0, dims, 2, dtype=np.float64) / dims) / (2.0 * math.pi)
    return mx.array(np.array([int(t * 2.0**64) for t in turns], dtype=np.uint64))


def rotary_angles(positions: mx.array, frequencies: mx.array) -> tuple[mx.array, mx.array]:
    """Cosine and sine of each position's angles.

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
    """Rotate the first ``2 P`` channels of each head; the rest pass through.

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
