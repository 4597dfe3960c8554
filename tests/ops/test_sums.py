"""Long sums against float64: norms, softmax denominators and losses of any width."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from helpers.float64 import to64

from mlx_rgemma.ops import add_rms_norm, rms_norm
from mlx_rgemma.ops.cross_entropy import cross_entropies
from mlx_rgemma.ops.sums import log_softmax, log_sum_exp, long_sum

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
def test_norms(width):
    x, delta, weight = inputs(width)
    assert rms(rms_norm(x, weight), exact_norm(x, weight)) <= NORM_RMS
    total, y = add_rms_norm(x, delta, weight)
    assert rms(y, exact_norm(total, weight)) <= NORM_RMS


@pytest.mark.parametrize("width", [63, 2560])
def test_gradients_of_norms(width):
    x, dy, weight = inputs(width, 8)
    _, (dx, dw) = mx.vjp(lambda *z: [rms_norm(*z)], [x, weight], [dy])
    x, dy, scale = to64(x), to64(dy), 1.0 + to64(weight)
    factor = 1.0 / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6)
    inner = (dy * scale * x).mean(-1, keepdims=True)
    expected = factor * (dy * scale - x * factor**2 * inner)
    assert np.abs(np.array(dx) - expected).max() < 2e-6
    assert np.abs(np.array(dw) - (dy * x * factor).sum(0)).max() < 1e-5


@pytest.mark.parametrize("width", [*WIDTHS, 64**2 + 1, 256_000])
def test_sums(width):
    x = mx.exp(mx.random.normal((4, width), key=mx.random.key(width)))
    found = long_sum(x)
    assert found.shape == (4, 1)
    assert rms(found, to64(x).sum(-1, keepdims=True)) < 2.5e-7


@pytest.mark.parametrize("width", [*WIDTHS, 512, 513, 2048, 256_000])
def test_log_sum_exp(width):
    """MLX's own is off by 5e-4 at 256,000 on a CPU."""
    logits = 3.0 * mx.random.normal((4, width), key=mx.random.key(width))
    exact = to64(logits)
    expected = np.log(np.exp(exact).sum(-1, keepdims=True))
    assert np.abs(np.array(log_sum_exp(logits)) - expected).max() < 3e-6
    assert np.abs(np.array(log_softmax(logits)) - (exact - expected)).max() < 4e-6


def test_log_sum_exp_of_masked_logits():
    """Whole groups of tokens may be ruled out, or all."""
    logits = mx.where(mx.arange(4096) == 3000, 5.0, -mx.inf)[None]
    assert log_sum_exp(logits).item() == 5.0
    assert log_softmax(logits)[0, 3000].item() == 0.0
    assert log_sum_exp(mx.full((1, 4096), -mx.inf)).item() == -np.inf


@pytest.mark.parametrize("cap", [0.0, 30.0])
def test_losses_of_a_large_vocabulary(cap):
    scores = 3.0 * mx.random.normal((8, 256_000), key=mx.random.key(1))
    targets = mx.arange(8) * 1000
    loss, gradient = mx.value_and_grad(lambda s: cross_entropies(s, targets, cap).sum())(scores)
    exact = to64(scores)
    logits = cap * np.tanh(exact / cap) if cap else exact
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    rows = np.arange(8)
    assert abs(loss.item() + np.log(shares[rows, rows * 1000]).sum()) < 3e-5
    if not cap:
        other = np.ones_like(shares, bool)
        other[rows, rows * 1000] = False
        assert rms(np.array(gradient)[other], shares[other]) < 2e-6
