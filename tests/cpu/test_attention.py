"""Attention with products by NumPy, beside MLX's own."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from helpers.assertions import max_error, relative_error
from helpers.attention_cases import Case, counted, packed

from mlx_rgemma import ops
from mlx_rgemma.cpu import attention
from mlx_rgemma.cpu.attention import attend
from mlx_rgemma.ops import backend
from mlx_rgemma.ops.backend import Backend


def gradient(function, *arrays):
    """Gradients of a sum that weighs each output differently."""

    def total(*arrays):
        y = function(*arrays).astype(mx.float32)
        return (y * mx.cos(mx.arange(y.size).reshape(y.shape))).sum()

    return mx.grad(total, argnums=list(range(len(arrays))))(*arrays)


@pytest.mark.parametrize("masked", [None, "shared", "by row"])
@pytest.mark.parametrize("length, keys", [(1, 40), (7, 40), (33, 65), (1, 9001), (6, 2049)])
def test_attention_is_mlx_attention(masked, length, keys):
    q = 3.0 * mx.random.normal((2, 5, length, 16), key=mx.random.key(0))
    k, v = mx.random.normal((2, 2, 1, keys, 16), key=mx.random.key(1))
    mask = None
    if masked is not None:
        rows = 1 if masked == "shared" else 2
        mask = mx.random.uniform(shape=(rows, 1, length, keys), key=mx.random.key(2)) < 0.4
        mask = mask | (mx.arange(keys) == 3)  # each query sees one key at least

    def its(q, k, v):
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=0.25, mask=mask)

    def ours(q, k, v):
        return attend(q, mx.concatenate([k, v], axis=1), mask)

    bound = 5e-6 if keys < 1000 else 2e-5  # of sums of so many, MLX's own included
    assert max_error(ours(q, k, v), np.array(its(q, k, v))) < bound
    for one, other in zip(gradient(ours, q, k, v), gradient(its, q, k, v), strict=True):
        assert relative_error(one, np.array(other)) < bound


def test_causal_masks():
    q = mx.random.normal((2, 3, 7, 16), key=mx.random.key(0))
    kv = mx.random.normal((2, 2, 7, 16), key=mx.random.key(1))
    expected = mx.fast.scaled_dot_product_attention(
        q, kv[:, :1], kv[:, 1:], scale=0.25, mask="causal"
    )
    assert max_error(attend(q, kv, "causal"), np.array(expected)) < 5e-6


@pytest.mark.parametrize("trace", [mx.compile, mx.vmap], ids=["compile", "vmap"])
def test_without_values_it_is_mlx_own(trace):
    q, kv = mx.random.normal((3, 2, 5, 4, 16)), mx.random.normal((3, 2, 2, 9, 16))
    if trace is mx.compile:
        q, kv = q[0], kv[0]
    found = trace(lambda q, kv: attend(q, kv, None))(q, kv)
    expected = (
        attend(q, kv, None)
        if q.ndim == 4
        else mx.stack([attend(*z, None) for z in zip(q, kv, strict=True)])
    )
    assert max_error(found, np.array(expected)) < 5e-6


@pytest.fixture
def numpy_decode(monkeypatch):
    """Decode by NumPy whatever the size; the number of calls."""
    calls = []
    scores = attention._scores
    monkeypatch.setattr(attention, "MIN_PRODUCTS", 1)
    monkeypatch.setattr(attention, "_scores", lambda *z: (calls.append(1), scores(*z))[1])
    return calls


def decode(case: Case, kv: mx.array, cached_len: int | None):
    return ops.decode_attention(
        *(case.q, case.k, case.v, *case.angles()),
        ops.RingBuffer(kv, case.write_pos),
        window=case.window,
        max_lookback=case.max_lookback,
        cached_len=cached_len,
    )


DECODE = {
    "full ring": (Case(3, 16, 7, counted(50, 1), slots=8, write_pos=3, bounded=False), None),
    "first token": (Case(3, 16, 7, counted(0, 1), slots=8), 0),
    "short": (Case(3, 16, 7, counted(3, 1), 2, slots=8, write_pos=3), 3),
    "short, wrapped": (Case(3, 16, 7, counted(3, 1), slots=8, write_pos=1), 3),
    "ragged": (Case(2, 16, 7, np.array([[0], [2], [90]]), 3, slots=8, write_pos=5), None),
    "more slots than the window": (
        Case(2, 20, 5, counted(50, 1), slots=9, write_pos=4, bounded=False),
        None,
    ),
    "one slot": (Case(2, 16, 1, np.array([[0], [4]]), 2, slots=1), None),
    "bfloat16": (Case(2, 16, 7, packed(1, start=9), slots=8, dtype=mx.bfloat16), None),
}


@pytest.mark.parametrize(("case", "cached_len"), DECODE.values(), ids=DECODE)
def test_decode_attention(case, cached_len, numpy_decode):
    out, ring = decode(case, case.ring.kv, cached_len)
    assert numpy_decode
    bound = 2.0**-7 if case.dtype == mx.bfloat16 else 2e-6
    assert relative_error(out.astype(mx.float32), case.rotated().expected()) < bound
    with backend.use(Backend.MLX):
        _, expected = decode(case, case.ring.kv, cached_len)
    assert ring.write_pos == expected.write_pos
    assert mx.array_equal(ring.kv, expected.kv)


def test_gradients_of_decode_attention(numpy_decode):
    case = Case(3, 16, 7, np.array([[2], [50]]), 2, slots=8, write_pos=5)
    cos, sin = case.angles()

    def function(q, k, v, kv):
        out, ring = ops.decode_attention(
            *(q, k, v, cos, sin, ops.RingBuffer(kv, 5)),
            window=7,
            max_lookback=case.max_lookback,
        )
        return mx.concatenate([out.flatten(), ring.kv.flatten()])

    arrays = (case.q, case.k, case.v, case.ring.kv)
    found = gradient(function, *arrays)
    assert numpy_decode
    with backend.use(Backend.MLX):
        expected = gradient(function, *arrays)
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, np.array(other)) < 5e-6


@pytest.mark.parametrize("trace", [mx.compile, mx.vmap], ids=["compile", "vmap"])
def test_decode_attention_without_values(trace, numpy_decode):
    case = Case(3, 16, 7, counted(50, 1), 2, slots=8, write_pos=5, bounded=False)
    cos, sin = case.angles()

    def one(q, k, v, kv):
        if trace is mx.vmap:
            q, k, v, kv = (x[None] for x in (q, k, v, kv))
        return ops.decode_attention(q, k, v, cos, sin, ops.RingBuffer(kv, 5), window=7)[0]

    out = trace(one)(case.q, case.k, case.v, case.ring.kv)
    expected = case.rotated().expected()
    assert max_error(out if trace is mx.compile else out[:, 0], expected) < 5e-6
