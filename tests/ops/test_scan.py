"""The linear recurrence in plain MLX, against float64: values and gradients."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from helpers import float64
from helpers.assertions import relative_error, tolerance
from helpers.float64 import to64
from helpers.golden_cases import arrays, cases
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_rgemma.ops.scan import CHUNK, SEQUENTIAL_STEPS, linear_scan

RTOL, GRADIENT_RTOL = tolerance(5e-6), tolerance(2e-5)
GRADIENTS = ("dx", "da", "dh0")
quick = settings(max_examples=40, deadline=None)


def normal(rng: np.random.Generator, *shape: int) -> mx.array:
    return mx.array(rng.standard_normal(shape, dtype=np.float32))


@pytest.mark.parametrize("name", cases("linear_scan"))
def test_golden(name):
    """With resets, where the coefficient is 0 and has no gradient."""
    case = cases("linear_scan")[name]
    x, a, h0, gy, gh_last = arrays(case, "x", "a", "h0", "gy", "gh_last")
    reset = mx.array(case["reset"]).astype(mx.bool_)[..., None]

    def states(x, a, h0):
        return linear_scan(x, mx.where(reset, 0.0, a), h0)

    def loss(x, a, h0):
        y = states(x, a, h0)
        return (y * gy).sum() + (y[:, -1] * gh_last).sum()

    y = states(x, a, h0)
    assert relative_error(y, case["y"]) < tolerance(2e-6)
    assert relative_error(y[:, -1], case["h_last"]) < tolerance(2e-6)
    gradients = mx.grad(loss, argnums=(0, 1, 2))(x, a, h0)
    for field, gradient in zip(("gx", "ga", "gh0"), gradients, strict=True):
        assert relative_error(gradient, case[field]) < tolerance(2e-6), field


@pytest.mark.parametrize(
    "length",
    [1, 2, SEQUENTIAL_STEPS, SEQUENTIAL_STEPS + 1, CHUNK * SEQUENTIAL_STEPS, CHUNK**3 + 1],
)
def test_lengths_of_each_kind(length):
    """One step, a sequential scan, chunks without and with padding, chunks of chunks."""
    check(batch=2, length=length, width=3, seed=length)


@quick
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 300),
    width=st.integers(1, 9),
    seed=st.integers(0, 2**31),
)
def test_values_and_gradients(batch, length, width, seed):
    check(batch, length, width, seed)


def check(batch: int, length: int, width: int, seed: int) -> None:
    """Compare with the loop, and with its gradients, in float64."""
    rng = np.random.default_rng(seed)
    x, h0 = normal(rng, batch, length, width), normal(rng, batch, width)
    coefficients = rng.choice([0.0, 1e-30, 0.3, 0.9, 0.9999, 1.0], x.shape)
    a = mx.array(coefficients.astype(np.float32))
    dy = normal(rng, batch, length, width)
    exact = float64.scan(*(to64(z) for z in (x, a, h0, dy)), np.zeros(h0.shape))
    (y,), gradients = mx.vjp(linear_scan, [x, a, h0], [dy])
    assert relative_error(y, exact["y"]) < RTOL
    for name, gradient in zip(GRADIENTS, gradients, strict=True):
        assert relative_error(gradient, exact[name]) < GRADIENT_RTOL, name


def test_gradients_in_transformations():
    """The gradient within `mx.vmap` and `mx.compile` is the gradient."""
    rng = np.random.default_rng(0)
    x, a, h0 = normal(rng, 3, 20, 4), mx.full((3, 20, 4), 0.5), normal(rng, 3, 4)
    gradient = mx.grad(lambda *z: mx.square(linear_scan(*z)).sum(), argnums=(0, 1, 2))
    expected = gradient(x, a, h0)
    rows = mx.vmap(lambda *z: gradient(*(part[None] for part in z)))(x, a, h0)
    for one, row, compiled in zip(expected, rows, mx.compile(gradient)(x, a, h0), strict=True):
        assert mx.allclose(row[:, 0], one, rtol=1e-5, atol=1e-6)
        assert mx.allclose(compiled, one, rtol=1e-5, atol=1e-6)
