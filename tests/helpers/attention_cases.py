"""Calls of the attention operations, their exact results in float64, and runs of the kernels."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest

from helpers.emulated import FORWARD_RTOL, assert_close, emulated
from helpers.float64 import to64
from mlx_rgemma.ops import (
    RingBuffer,
    apply_rotary,
    prefill_attention,
    rotary_angles,
    rotary_frequencies,
)
from mlx_rgemma.ops.prefill_attention import PREFILL_ATTENTION


def random(rng: np.random.Generator, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    return mx.array(rng.standard_normal(shape, dtype=np.float32)).astype(dtype)


@dataclass
class Case:
    """One call: some tokens per sequence, at `positions` of their documents.

    Attributes:
        heads, head_dim, window, dtype: Of the layer.
        positions: (1 or B, L), each token's position in its document; 0 where a document
            starts.
        batch: B.
        slots: Of the ring; 0 for none.
        write_pos: The slot of the next token.
        bounded: Whether the call is given `max_lookback`.
        seed: Of the numbers.
    """

    heads: int
    head_dim: int
    window: int
    positions: np.ndarray
    batch: int = 1
    slots: int = 0
    write_pos: int = 0
    bounded: bool = True
    dtype: mx.Dtype = mx.float32
    seed: int = 0

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        length = self.positions.shape[1]
        self.q = random(rng, (self.batch, self.heads, length, self.head_dim), self.dtype)
        self.k = random(rng, (self.batch, 1, length, self.head_dim), self.dtype)
        self.v = random(rng, (self.batch, 1, length, self.head_dim), self.dtype)
        self.ring = None
        if self.slots:
            kv = random(rng, (self.batch, 2, self.slots, self.head_dim), self.dtype)
            self.ring = RingBuffer(kv, self.write_pos)
        max_lookback = np.minimum(self.positions, self.window).astype(np.int32)
        self.max_lookback = mx.array(max_lookback) if self.bounded else None

    def angles(self) -> tuple[mx.array, mx.array]:
        pairs = max(2, self.head_dim // 2 // 2 * 2)
        return rotary_angles(mx.array(self.positions), rotary_frequencies(pairs, 10000.0))

    def rotated(self) -> Case:
        """Return the same call with rotated queries and keys, by the reference."""
        other = Case(**{name: getattr(self, name) for name in self.__dataclass_fields__})
        cos, sin = self.angles()
        other.q, other.k = apply_rotary(self.q, cos, sin), apply_rotary(self.k, cos, sin)
        return other

    def expected(self) -> np.ndarray:
        """Return (B, H, L, head_dim) by the definition, query by query, from rotated q and k."""
        q, k, v = to64(self.q), to64(self.k), to64(self.v)
        length = q.shape[2]
        if self.ring is not None:
            order = [(self.write_pos - d) % self.slots for d in range(self.slots, 0, -1)]
            ring = to64(self.ring.kv)[:, :, order]
            k = np.concatenate([ring[:, :1], k], axis=2)
            v = np.concatenate([ring[:, 1:], v], axis=2)
        positions = np.broadcast_to(self.positions, (self.batch, length))
        out = np.zeros(q.shape)
        for b in range(self.batch):
            for i in range(length):
                here = self.slots + i
                max_lookback = self.window
                if self.bounded:
                    max_lookback = min(max_lookback, int(positions[b, i]))
                seen = slice(max(0, here - max_lookback), here + 1)
                scores = q[b, :, i] @ k[b, 0, seen].T / np.sqrt(self.head_dim)
                weights = np.exp(scores - scores.max(axis=1, keepdims=True))
                out[b, :, i] = weights / weights.sum(axis=1, keepdims=True) @ v[b, 0, seen]
        return out


def counted(start: int, length: int) -> np.ndarray:
    """Return consecutive positions of one document: (1, L)."""
    return np.arange(start, start + length)[None]


def packed(length: int, *borders: int, start: int = 0) -> np.ndarray:
    """Return positions of a row in which documents start at `borders`: (1, L)."""
    positions = np.arange(start, start + length)
    for border in borders:
        positions[border:] = np.arange(length - border)
    return positions[None]


def windowed_attention(
    q, k, v, *, window, max_lookback=None, ring=None, cached_len=None
) -> mx.array:
    """Attend from rotated queries, as `prefill_attention` does after the rotation."""
    kv = mx.concatenate([k, v], axis=1)
    past, write_pos = (None, 0) if ring is None else ring
    options = {"write_pos": write_pos, "window": window, "cached_len": cached_len}
    return PREFILL_ATTENTION(q, kv, past, max_lookback, **options)


HEAD_DIMS = (16, 24, 32, 48, 64, 128, 256)
DTYPES_AND_HEAD_DIMS = [
    *(pytest.param(mx.float32, d, id=f"fp32-{d}") for d in (*HEAD_DIMS, 20)),
    *(pytest.param(mx.bfloat16, d, id=f"bf16-{d}") for d in (16, 256)),
    *(pytest.param(mx.float16, d, id=f"fp16-{d}") for d in (64, 256)),
]
PACKED = packed(45, 20, start=9)


def attend_rotated(case: Case, **how):
    """Return the attention of a chunk that is rotated already, and the launches."""
    with emulated(**how) as launches:
        out = windowed_attention(
            *(case.q, case.k, case.v),
            window=case.window,
            max_lookback=case.max_lookback,
            ring=case.ring,
        )
        mx.eval(out)
    return out, launches


def attend(case: Case, **how):
    """Return the attention of a call, the keys and values for the ring, and the launches."""
    with emulated(**how) as launches:
        out, kv = prefill_attention(
            *(case.q, case.k, case.v, *case.angles()),
            window=case.window,
            max_lookback=case.max_lookback,
            ring=case.ring,
        )
        mx.eval(out, kv)
    return out, kv, launches


def assert_rotated(case: Case) -> None:
    """Compare the attention of a rotated chunk with float64; it is one launch."""
    out, launches = attend_rotated(case)
    assert len(launches) == 1
    assert_close("out", out, case.expected(), FORWARD_RTOL)


def assert_call(case: Case) -> None:
    """Compare a call with float64; its rotated keys are bit-identical to the reference's."""
    out, kv, _ = attend(case)
    turned = case.rotated()
    assert_close("out", out, turned.expected(), FORWARD_RTOL)
    assert mx.array_equal(kv, mx.concatenate([turned.k, turned.v], axis=1))


def dense_attention(q, k, v, window: int, positions: np.ndarray) -> np.ndarray:
    """Return attention with every score computed, in float64; positions count per document."""
    q, k, v = (np.array(z, dtype=np.float64) for z in (q, k, v))
    length = q.shape[2]
    distance = np.arange(length)[:, None] - np.arange(length)
    visible = (distance >= 0) & (distance <= np.minimum(positions, window)[:, :, None])
    scores = np.einsum("bhqd,bskd->bhqk", q, k) * q.shape[-1] ** -0.5
    scores = np.where(visible[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("bhqk,bskd->bhqd", weights / weights.sum(axis=-1, keepdims=True), v)
