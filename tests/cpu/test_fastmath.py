"""Fast exponentials and what is made of them, beside float64 and MLX's own."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from helpers.assertions import max_error, relative_error

from mlx_rgemma.cpu import fastmath
from mlx_rgemma.ops import activations
from mlx_rgemma.ops.cross_entropy import cross_entropies

X = np.concatenate(
    [np.linspace(-30, 30, 20001), np.linspace(-0.01, 0.01, 2001), [-0.0, 0.0, -87.0, 87.0]]
).astype(np.float32)
EXACT = X.astype(np.float64)


def gradient(function, *arrays):
    """Gradients of a sum that weighs each output differently."""

    def total(*arrays):
        y = function(*arrays).astype(mx.float32)
        return (y * mx.cos(mx.arange(y.size).reshape(y.shape))).sum()

    return mx.grad(total, argnums=list(range(len(arrays))))(*arrays)


def test_sigmoid_is_accurate_relative_to_itself():
    exact = 1.0 / (1.0 + np.exp(-EXACT))
    got = np.array(fastmath.sigmoid(mx.array(X)), np.float64)
    assert np.abs(got / exact - 1.0).max() < 6e-6
    assert max_error(fastmath.sigmoid(mx.array(X)), exact) < 1.5e-7


@pytest.mark.parametrize("limit", [1e-6, 0.3, 12.0, 200.0])
def test_tanh_is_accurate_relative_to_itself(limit):
    x = np.linspace(-limit, limit, 1 << 16).astype(np.float32)
    exact = np.tanh(x.astype(np.float64))
    got = np.array(fastmath.tanh(mx.array(x)), np.float64)
    assert not np.array_equal(got, np.array(mx.tanh(mx.array(x))))  # one's own
    assert np.abs(got / exact - 1.0).max() < 3e-7


def test_tanh_and_the_soft_cap_have_gradients():
    """mlx-lm's learned quantizations go through the logits."""
    x = mx.linspace(-90.0, 90.0, 1 << 15)
    slopes = mx.grad(lambda x: fastmath.tanh(x).sum())(x)
    assert max_error(slopes, 1.0 - np.tanh(np.array(x, np.float64)) ** 2) < 1e-6
    cap = mx.array(30.0)
    slopes = mx.grad(lambda x: activations.soft_cap(x, cap).sum())(x)
    assert max_error(slopes, 1.0 - np.tanh(np.array(x, np.float64) / 30.0) ** 2) < 1e-6


def test_tanh_ends_where_float32_does():
    x = np.zeros(1 << 15, np.float32)
    x[:5] = [-np.inf, np.inf, -1e30, 1e30, np.nan]
    got = np.array(fastmath.tanh(mx.array(x)))
    assert (got[:4] == [-1.0, 1.0, -1.0, 1.0]).all() and np.isnan(got[4]) and (got[5:] == 0.0).all()


@pytest.mark.parametrize("cap", [30.0, 1000.0, 0.0])
def test_cross_entropy_and_its_gradient(cap):
    """Rows of more than 2^15 scores go through the powers of two; beside float64."""
    rng = np.random.default_rng(0)
    scores = 20.0 * rng.standard_normal((5, 40_000))
    targets, weights = rng.integers(0, 40_000, 5), np.array([1.0, -2.0, 0.0, 3.0, 0.5])
    scores[0, targets[0]] = 300.0  # all but certain

    curve = np.tanh(scores / cap) if cap else None
    logits = scores if curve is None else cap * curve
    top = logits.max(axis=1, keepdims=True)
    powers = np.exp(logits - top)
    total = powers.sum(axis=1, keepdims=True)
    losses = (np.log(total) + top)[:, 0] - logits[np.arange(5), targets]
    slopes = powers / total
    slopes[np.arange(5), targets] -= 1.0
    slopes *= weights[:, None] * (1.0 if curve is None else 1.0 - curve**2)

    def weighted(scores):
        return (cross_entropies(scores, mx.array(targets), cap) * mx.array(weights)).sum()

    arrays = mx.array(scores)
    assert max_error(cross_entropies(arrays, mx.array(targets), cap), losses) < 3e-5
    assert max_error(mx.grad(weighted)(arrays), slopes) < 3e-6


@pytest.mark.parametrize("size", [100, 1 << 16], ids=["small", "large"])
def test_powers_of_two_are_exact_to_the_last_bit(size):
    x = np.linspace(-124.9, 126.9, size).astype(np.float32)
    exact = np.exp2(x.astype(np.float64))
    assert np.abs(np.array(fastmath.exp2(mx.array(x)), np.float64) / exact - 1.0).max() < 1.2e-7
    whole = mx.arange(-125, 128).astype(mx.float32)
    many = mx.concatenate([whole] * (1 + size // 128))
    assert mx.array_equal(fastmath.exp2(many), mx.power(2.0, many))


def test_powers_of_two_end_where_float32_does():
    x = np.zeros(1 << 16, np.float32)
    x[:6] = [-1e30, -np.inf, -150.0, 1e30, np.inf, np.nan]
    got = np.array(fastmath.exp2(mx.array(x)))
    assert (got[:3] == 2.0**-125).all() and (got[3:5] == 2.0**127).all() and np.isnan(got[5])
    assert (got[6:] == 1.0).all()


@pytest.mark.parametrize("size", [1, 5000], ids=["small", "large"])
def test_gate_coefficients_have_no_cancellation(size):
    log_a = -np.concatenate([[0.0, 200.0, 1e-38], np.logspace(-12, 1.9, size)])
    log_a = log_a.astype(np.float32)
    a, multiplier = fastmath.gate_coefficients(mx.array(log_a))
    exact = log_a.astype(np.float64)
    assert max_error(a, np.exp(exact)) < 1.2e-7
    expected = np.sqrt(-np.expm1(2.0 * exact))
    assert np.array(multiplier)[0] == 0.0
    assert np.abs(np.array(multiplier)[1:] / expected[1:] - 1.0).max() < 4e-7


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_gated_gelu_is_gelu(dtype):
    gate, x = mx.array(X).astype(dtype), mx.cos(mx.array(X)).astype(dtype)
    g, other = (np.array(z.astype(mx.float32), np.float64) for z in (gate, x))
    inner = np.sqrt(2.0 / np.pi) * (g + 0.044715 * g**3)
    exact = 0.5 * g * (1.0 + np.tanh(inner)) * other
    value, slope = (3e-7, 2e-6) if dtype == mx.float32 else (2.0**-8, 1e-2)
    assert relative_error(activations.gated_gelu(gate, x).astype(mx.float32), exact) < value
    plain = activations.gated_gelu.reference
    for ours, its in zip(
        gradient(activations.gated_gelu, gate, x), gradient(plain, gate, x), strict=True
    ):
        assert ours.dtype == dtype
        its = np.array(its.astype(mx.float32))
        assert relative_error(ours.astype(mx.float32), its) < slope


def test_soft_cap_caps():
    logits, cap = mx.array(X) * 10.0, mx.array(30.0)
    exact = 30.0 * np.tanh(EXACT / 3.0)
    assert max_error(activations.soft_cap(logits, cap), exact) < 1e-5
    small = mx.linspace(-1.0, 1.0, 101)  # a large cap must not multiply an error near 0
    far = np.array(small, np.float64)
    assert (
        max_error(activations.soft_cap(small, mx.array(1000.0)), 1000 * np.tanh(far / 1000)) < 1e-6
    )
    assert activations.soft_cap(mx.array([1e6, -1e6]), cap).tolist() == [30.0, -30.0]
