"""Properties that hold for any shape, chunking and border: found by search, not by example."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from conftest import relative_error, tolerance
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_rgemma import ops

RTOL, GRADIENT_RTOL = tolerance(5e-6), tolerance(2e-5)
quick = settings(max_examples=40, deadline=None)
lengths = st.integers(1, 300)
seeds = st.integers(0, 2**31)


def normal(rng: np.random.Generator, *shape: int) -> mx.array:
    return mx.array(rng.standard_normal(shape).astype(np.float32))


def loop_scan(x, a, h0):
    x, a, h = (np.array(z, dtype=np.float64) for z in (x, a, h0))
    y = np.zeros_like(x)
    for t in range(x.shape[1]):
        h = a[:, t] * h + x[:, t]
        y[:, t] = h
    return y


@quick
@given(st.integers(1, 3), lengths, st.integers(1, 9), seeds)
def test_scan_is_the_loop(batch, length, width, seed):
    rng = np.random.default_rng(seed)
    x, h0 = normal(rng, batch, length, width), normal(rng, batch, width)
    a = mx.array(rng.choice([0.0, 1e-30, 0.3, 0.9, 0.9999, 1.0], x.shape).astype(np.float32))
    reset = mx.array(rng.random((batch, length)) < 0.1)
    y, h_last = ops.linear_scan(x, a, h0, reset)
    expected = loop_scan(x, mx.where(reset[..., None], 0.0, a), h0)
    assert relative_error(y, expected) < RTOL
    assert mx.array_equal(y[:, -1], h_last)


@quick
@given(lengths, st.integers(1, 299), seeds)
def test_rg_lru_may_be_cut_anywhere(length, cut, seed):
    rng = np.random.default_rng(seed)
    x, i, r = (normal(rng, 2, length, 5) for _ in range(3))
    a_param, h0 = normal(rng, 5), normal(rng, 2, 5)
    reset = mx.array(rng.random((2, length)) < 0.05)
    whole, h_whole = ops.rg_lru(x, i, r, a_param, h0, reset)
    cut = min(cut, length)
    y, h = ops.rg_lru(x[:, :cut], i[:, :cut], r[:, :cut], a_param, h0, reset[:, :cut])
    parts = [y]
    if cut < length:
        y, h = ops.rg_lru(x[:, cut:], i[:, cut:], r[:, cut:], a_param, h, reset[:, cut:])
        parts.append(y)
    assert relative_error(mx.concatenate(parts, axis=1), np.array(whole)) < RTOL
    assert relative_error(h, np.array(h_whole)) < RTOL


@quick
@given(st.integers(1, 60), st.lists(st.integers(0, 60), min_size=1, max_size=5), seeds)
def test_padding_is_as_if_it_were_not_there(length, row_lengths, seed):
    rng = np.random.default_rng(seed)
    row_lengths = [min(n, length) for n in row_lengths]
    batch, width = len(row_lengths), 4
    x, i, r = (normal(rng, batch, length, width) for _ in range(3))
    a_param, h0 = normal(rng, width), normal(rng, batch, width)
    weight, state = normal(rng, width, 4, 1), normal(rng, batch, 3, width)
    lengths = mx.array(row_lengths)
    mask = mx.arange(length) < lengths[:, None]
    conv, new_state = ops.causal_conv1d(x, weight, None, state, lengths=lengths)
    y, h_last = ops.rg_lru(x, i, r, a_param, h0, mask=mask)
    for row, n in enumerate(row_lengths):
        one = slice(row, row + 1)
        if n == 0:
            assert mx.array_equal(h_last[one], h0[one])
            assert mx.array_equal(new_state[one], state[one])
            continue
        alone, h_alone = ops.rg_lru(x[one, :n], i[one, :n], r[one, :n], a_param, h0[one])
        assert relative_error(y[one, :n], np.array(alone)) < RTOL
        assert relative_error(h_last[one], np.array(h_alone)) < RTOL
        alone, state_alone = ops.causal_conv1d(x[one, :n], weight, None, state[one])
        assert relative_error(conv[one, :n], np.array(alone)) < RTOL
        assert mx.array_equal(new_state[one], state_alone)


def dense_attention(q, k, v, window, positions):
    """Every score, in float64; positions count from each document's start."""
    q, k, v = (np.array(z, dtype=np.float64) for z in (q, k, v))
    length = q.shape[2]
    distance = np.arange(length)[:, None] - np.arange(length)
    visible = (distance >= 0) & (distance <= np.minimum(positions, window)[:, :, None])
    scores = np.einsum("bhqd,bskd->bhqk", q, k) * q.shape[-1] ** -0.5
    scores = np.where(visible[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("bhqk,bskd->bhqd", weights / weights.sum(axis=-1, keepdims=True), v)


@quick
@given(st.integers(1, 90), st.integers(0, 40), st.integers(1, 5), st.booleans(), seeds)
def test_attention_is_the_dense_band(length, window, heads, packed, seed):
    rng = np.random.default_rng(seed)
    q = normal(rng, 2, heads, length, 8)
    k, v = normal(rng, 2, 1, length, 8), normal(rng, 2, 1, length, 8)
    positions = np.broadcast_to(np.arange(length), (2, length)).copy()
    reach = None
    if packed:
        for row in range(2):
            for start in sorted(rng.integers(0, length, 3)):
                positions[row, start:] = np.arange(length - start)
        reach = mx.minimum(mx.array(positions), window)
    out = ops.windowed_attention(q, k, v, window=window, reach=reach)
    assert relative_error(out, dense_attention(q, k, v, window, positions)) < RTOL


@quick
@given(st.integers(0, 40), st.integers(1, 30), st.integers(1, 20), seeds)
def test_attention_over_the_ring(past, length, window, seed):
    """A ring of any fill and rotation, then a chunk, is the same as one sequence."""
    rng = np.random.default_rng(seed)
    total = past + length
    q = normal(rng, 1, 2, total, 8)
    k, v = normal(rng, 1, 1, total, 8), normal(rng, 1, 1, total, 8)
    positions = np.arange(total)[None]
    expected = dense_attention(q, k, v, window, positions)[:, :, past:]
    slots = window + 1
    kv = np.zeros((1, 2, slots, 8), np.float32)
    for t in range(past):
        kv[:, 0, t % slots], kv[:, 1, t % slots] = np.array(k)[:, 0, t], np.array(v)[:, 0, t]
    ring = ops.Ring(mx.array(kv), past % slots)
    reach = mx.array(np.minimum(positions[:, past:], window))
    out = ops.windowed_attention(
        q[:, :, past:], k[:, :, past:], v[:, :, past:], window=window, reach=reach, ring=ring
    )
    assert relative_error(out, expected) < RTOL
    if length == 1:
        slot = past % slots
        kv[:, 0, slot], kv[:, 1, slot] = np.array(k)[:, 0, past], np.array(v)[:, 0, past]
        ring = ops.Ring(mx.array(kv), (past + 1) % slots)
        out = ops.ring_attention(q[:, :, past:], ring, window=window, reach=reach)
        assert relative_error(out, expected) < RTOL


@quick
@given(st.integers(513, 1400), st.integers(1, 300), seeds)
def test_attention_in_blocks_of_queries(length, window, seed):
    rng = np.random.default_rng(seed)
    q = normal(rng, 1, 1, length, 4)
    k, v = normal(rng, 1, 1, length, 4), normal(rng, 1, 1, length, 4)
    out = ops.windowed_attention(q, k, v, window=window)
    expected = dense_attention(q, k, v, window, np.arange(length)[None])
    assert relative_error(out, expected) < RTOL


@quick
@given(lengths, seeds)
def test_scan_gradients_are_the_loops(length, seed):
    """Against the loop differentiated by hand in float64."""
    rng = np.random.default_rng(seed)
    x, a = normal(rng, 1, length, 3), mx.array(rng.random((1, length, 3)).astype(np.float32))
    h0, g = normal(rng, 1, 3), normal(rng, 1, length, 3)
    gradients = mx.grad(lambda *z: (ops.linear_scan(*z)[0] * g).sum(), argnums=(0, 1, 2))(x, a, h0)
    h = loop_scan(x, a, h0)
    a64, g64 = np.array(a, np.float64), np.array(g, np.float64)
    dh, dx, da = np.zeros((1, 3)), np.zeros_like(h), np.zeros_like(h)
    for t in range(length - 1, -1, -1):
        dh = dh + g64[:, t]
        previous = h[:, t - 1] if t else np.array(h0, np.float64)
        dx[:, t], da[:, t] = dh, dh * previous
        dh = a64[:, t] * dh
    for gradient, expected in zip(gradients, (dx, da, dh), strict=True):
        assert relative_error(gradient, expected) < GRADIENT_RTOL
