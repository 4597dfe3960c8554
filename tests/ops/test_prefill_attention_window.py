"""Attention of a chunk equals dense attention with a band of visible keys, for any shapes."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from helpers.assertions import relative_error, tolerance
from helpers.attention_cases import dense_attention, random, windowed_attention
from helpers.emulated import run_by
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_rgemma import ops
from mlx_rgemma.ops.prefill_attention import QUERY_BLOCK

RTOL = tolerance(5e-6)


def normal(rng: np.random.Generator, *shape: int) -> mx.array:
    return random(rng, shape, mx.float32)


@pytest.mark.parametrize("implementation", ["default", "reference"])
@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 90),
    window=st.integers(0, 40),
    heads=st.integers(1, 5),
    is_packed=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_attention_is_the_dense_band(implementation, length, window, heads, is_packed, seed):
    rng = np.random.default_rng(seed)
    q = normal(rng, 2, heads, length, 8)
    k, v = normal(rng, 2, 1, length, 8), normal(rng, 2, 1, length, 8)
    positions = np.broadcast_to(np.arange(length), (2, length)).copy()
    lookback = None
    if is_packed:
        for row in range(2):
            for start in sorted(rng.integers(0, length, 3)):
                positions[row, start:] = np.arange(length - start)
        lookback = mx.minimum(mx.array(positions), window)
    with run_by(implementation):
        out = windowed_attention(q, k, v, window=window, max_lookback=lookback)
    assert relative_error(out, dense_attention(q, k, v, window, positions)) < RTOL


@pytest.mark.parametrize("implementation", ["default", "reference"])
@settings(max_examples=40, deadline=None)
@given(
    past=st.integers(0, 40),
    length=st.integers(1, 30),
    window=st.integers(1, 20),
    same_length=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_a_chunk_after_a_ring(implementation, past, length, window, same_length, seed):
    """A ring with any number of tokens, then a chunk, gives the same as one sequence."""
    rng = np.random.default_rng(seed)
    total, slots = past + length, window + 1
    q = normal(rng, 1, 2, total, 8)
    k, v = normal(rng, 1, 1, total, 8), normal(rng, 1, 1, total, 8)
    positions = np.arange(total)[None]
    kv = np.zeros((1, 2, slots, 8), np.float32)
    for t in range(past):
        kv[:, 0, t % slots], kv[:, 1, t % slots] = np.array(k)[:, 0, t], np.array(v)[:, 0, t]
    with run_by(implementation):
        out = windowed_attention(
            *(q[:, :, past:], k[:, :, past:], v[:, :, past:]),
            window=window,
            max_lookback=mx.array(np.minimum(positions[:, past:], window)),
            ring=ops.RingBuffer(mx.array(kv), past % slots),
            cached_len=min(window, past) if same_length else None,
        )
    expected = dense_attention(q, k, v, window, positions)[:, :, past:]
    assert relative_error(out, expected) < RTOL


@pytest.mark.parametrize("implementation", ["default", "reference"])
@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(QUERY_BLOCK + 1, 1400),
    window=st.integers(1, 300),
    seed=st.integers(0, 2**31),
)
def test_blocks_of_queries(implementation, length, window, seed):
    rng = np.random.default_rng(seed)
    q = normal(rng, 1, 1, length, 4)
    k, v = normal(rng, 1, 1, length, 4), normal(rng, 1, 1, length, 4)
    with run_by(implementation):
        out = windowed_attention(q, k, v, window=window)
    expected = dense_attention(q, k, v, window, np.arange(length)[None])
    assert relative_error(out, expected) < RTOL
