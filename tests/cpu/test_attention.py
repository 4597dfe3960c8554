"""Attention with products by NumPy, beside MLX's own."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from conftest import max_error, relative_error

from mlx_rgemma.cpu.attention import attend


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
