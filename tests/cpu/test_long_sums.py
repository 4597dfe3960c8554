"""Long sums of the CPU backend against float64: norms and softmax denominators."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from helpers.float64 import to64

from mlx_rgemma.cpu.attention import attend
from mlx_rgemma.ops import add_rms_norm, inference_mode, rms_norm
from mlx_rgemma.ops.prefill_attention import PREFILL_ATTENTION

WIDTHS = [1, 7, 63, 64, 65, 100, 509, 1000, 2560, 4093, 4096]
NORM_RMS = 1e-7
"""Of the relative error: three roundings of a product are 6e-8. A sum in sequence of 2,560 squares
is off by 4.2e-7."""


def rms(found, expected) -> float:
    """Root mean square of the relative error."""
    return float(np.sqrt(np.mean(np.square(np.array(found, np.float64) / expected - 1.0))))


def inputs(width: int, rows: int = 64):
    rng = np.random.default_rng(width)
    x, delta = (mx.array(rng.standard_normal((rows, width), np.float32)) for _ in range(2))
    return x, delta, mx.array(0.1 * rng.standard_normal(width).astype(np.float32))


def exact_norm(x, weight):
    x = to64(x)
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6) * (1.0 + to64(weight))


@pytest.mark.parametrize("width", WIDTHS)
def test_norms(ran, width):
    x, delta, weight = inputs(width)
    with inference_mode():
        y, (total, added) = rms_norm(x, weight), add_rms_norm(x, delta, weight)
    assert ran == ["rms_norm", "add_rms_norm"]
    assert rms(y, exact_norm(x, weight)) <= NORM_RMS
    assert rms(added, exact_norm(total, weight)) <= NORM_RMS


@pytest.mark.parametrize("keys", [100, 2049])
@pytest.mark.parametrize("queries", [1, 64])
def test_softmax(ran, keys, queries):
    """Its denominator is a sum over all keys; in sequence it would be off by 1e-6."""
    rng = np.random.default_rng(keys)
    q = mx.array(rng.standard_normal((1, 8, queries, 64), np.float32))
    k = mx.array(rng.standard_normal((1, 1, keys, 64), np.float32))
    v = mx.array(1.0 + rng.random((1, 1, keys, 64), np.float32))
    sees = np.arange(keys) <= np.arange(keys - queries, keys)[:, None]
    scores = np.where(sees, np.einsum("bhqd,bgkd->bhqk", to64(q), to64(k)) / 8.0, -np.inf)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    expected = np.einsum("bhqk,bgkd->bhqd", shares, to64(v))
    kv = mx.concatenate([k, v], axis=1)
    assert rms(attend(q, kv, mx.array(sees)), expected) < 8e-7  # products of a BLAS
    if queries > 1:
        options = {"write_pos": 0, "window": keys, "cached_len": None}
        with inference_mode():
            found = PREFILL_ATTENTION(q, kv, None, None, **options)
        assert ran == ["sliding_window_attention"] and rms(found, expected) < 3e-7
