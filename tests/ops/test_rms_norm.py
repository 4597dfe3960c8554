"""RMSNorm: its reference and its emulated kernels, against float64 and Google's code."""

from __future__ import annotations

import itertools

import mlx.core as mx
import numpy as np
import pytest
from helpers.assertions import relative_error, tolerance
from helpers.emulated import (
    FLOATS,
    FORWARD_RTOL,
    GRADIENT_RTOL,
    IMPLEMENTATIONS,
    assert_close,
    emulated,
    launched,
    needs_compiler,
    run_by,
)
from helpers.float64 import to64
from helpers.graphs import primitives
from helpers.models import golden

from mlx_rgemma import ops
from mlx_rgemma.ops import backend
from mlx_rgemma.ops.backend import Backend
from mlx_rgemma.ops.rms_norm import ADD_NORM, NORM

EPS = 1e-6
WIDTHS = [1, 7, 40, 257, 2560, 5000]


def inputs(shape, *dtypes, scale=1.0):
    """x, delta and weight."""
    rng = np.random.default_rng(shape[-1])
    x, delta = (rng.standard_normal(shape, np.float32) * scale for _ in range(2))
    weight = rng.standard_normal(shape[-1:], np.float32)
    return [mx.array(z).astype(d) for z, d in zip((x, delta, weight), dtypes, strict=True)]


def exact_norm(x: mx.array, weight: mx.array) -> np.ndarray:
    x, weight = to64(x), to64(weight)
    return x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + EPS) * (1.0 + weight)


def assert_norm(x, weight, dtype=None, **how):
    with emulated(**how) as launches:
        y = ops.rms_norm(x, weight, EPS, dtype=dtype)
        mx.eval(y)
    assert launched(launches) == ["rms_norm"]
    assert y.dtype == (dtype or x.dtype)
    assert_close("y", y, exact_norm(x, weight), FORWARD_RTOL)
    return launches[0]


def assert_add_norm(x, delta, weight, dtype=None, **how):
    with emulated(**how) as launches:
        total, y = ops.add_rms_norm(x, delta, weight, EPS, dtype=dtype)
        mx.eval(total, y)
    assert launched(launches) == ["add_rms_norm"]
    assert (total.dtype, y.dtype) == (x.dtype, dtype or delta.dtype)
    added = (x.astype(mx.float32) + delta.astype(mx.float32)).astype(x.dtype)
    assert mx.array_equal(total, added)
    assert_close("y", y, exact_norm(added, weight), FORWARD_RTOL)
    return launches[0]


@needs_compiler
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [(1,), (3,), (2, 5)], ids=str)
def test_shapes(rows, width):
    x, delta, weight = inputs((*rows, width), *[mx.float32] * 3)
    assert_norm(x, weight)
    assert_add_norm(x, delta, weight)


@needs_compiler
@pytest.mark.parametrize(
    ("x_dtype", "dtype"), list(itertools.product(FLOATS, FLOATS)), ids=lambda name: name
)
def test_dtypes(x_dtype, dtype):
    x_dtype, dtype = FLOATS[x_dtype], FLOATS[dtype]
    x, delta, weight = inputs((3, 80), x_dtype, dtype, dtype)
    assert_norm(x, weight, dtype)
    assert_add_norm(x, delta, weight)
    assert_add_norm(x, delta, weight.astype(mx.float32), dtype)


@needs_compiler
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e3])
def test_sizes(scale):
    x, delta, weight = inputs((2, 80), *[mx.float32] * 3, scale=scale)
    assert_norm(x, weight)
    assert_add_norm(x, delta, weight)


@needs_compiler
def test_rows_that_are_not_contiguous():
    x, delta, weight = inputs((40, 6), *[mx.float32] * 3)
    x, delta, weight = x.T, delta.T, mx.concatenate([weight] * 7)[:40]
    assert_norm(x, weight)
    assert_add_norm(x, delta, weight)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["rmsnorm_unit", "rmsnorm_small", "rmsnorm_large"])
def test_golden(name, implementation):
    pieces = golden("ops/pieces.npz")
    x, weight = mx.array(pieces[f"{name}/x"]), mx.array(pieces[f"{name}/weight"])
    with run_by(implementation, "add_rms_norm"):
        y = ops.rms_norm(x, weight, EPS)
        total, z = ops.add_rms_norm(x, mx.zeros_like(x), weight, EPS)
    assert mx.array_equal(total, x)
    assert relative_error(y, pieces[f"{name}/y"]) < tolerance(2e-6)
    assert relative_error(z, pieces[f"{name}/y"]) < tolerance(2e-6)


@needs_compiler
@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
@pytest.mark.parametrize("width", [1, 40, 5000])
def test_checked_in_every_order(width, order):
    x, delta, weight = inputs((3, width), mx.float32, mx.bfloat16, mx.bfloat16)
    how = {"mode": "checked", "order": order}
    launch = assert_norm(x, weight, mx.bfloat16, **how)
    assert launch.traffic["normalized"].stores == x.size
    launch = assert_add_norm(x, delta, weight, **how)
    # The stream is read once, and the sum once more from where it has just been written.
    assert launch.traffic["x"].loads == launch.traffic["delta"].loads == x.size
    assert launch.traffic["sum"].stores == launch.traffic["normalized"].stores == x.size


def test_is_one_launch():
    x, delta, weight = inputs((1, 1, 80), mx.float32, mx.bfloat16, mx.bfloat16)

    def norm(x, delta, weight):
        return ops.rms_norm(x, weight, EPS, dtype=mx.bfloat16)

    def add_norm(x, delta, weight):
        return ops.add_rms_norm(x, delta, weight, EPS)

    for function in (norm, add_norm):
        assert primitives(function, x, delta, weight) == ["CustomKernel"]


@needs_compiler
def test_gradients_are_those_of_the_reference():
    x, delta, weight = inputs((2, 3, 40), *[mx.float32] * 3)

    def loss(x, delta, weight):
        total, y = ops.add_rms_norm(x, delta, weight, EPS)
        return mx.square(y).sum() + (mx.sin(total) * ops.rms_norm(x, weight, EPS)).sum()

    gradient = mx.grad(loss, argnums=(0, 1, 2))
    with emulated() as launches:
        got = gradient(x, delta, weight)
        mx.eval(got)
    assert {"rms_norm", "add_rms_norm"} <= set(launched(launches))
    with backend.use(Backend.MLX):
        expected = gradient(x, delta, weight)
    for one, other in zip(got, expected, strict=True):
        assert relative_error(one, np.array(other)) < GRADIENT_RTOL


@needs_compiler
@pytest.mark.parametrize("kernel", [NORM, ADD_NORM], ids=lambda kernel: kernel.name)
def test_validation(kernel):
    with emulated(validate=True):
        for variant in kernel.variants:
            assert kernel.validated(*variant), kernel.validation


@needs_compiler
def test_integers_use_the_reference():
    with emulated() as launches:
        y = ops.rms_norm(mx.arange(12).reshape(2, 6), mx.zeros((6,)), dtype=mx.float32)
    assert not launches
    assert_close("y", y, exact_norm(mx.arange(12.0).reshape(2, 6), mx.zeros((6,))), FORWARD_RTOL)


def test_wrong_shapes_are_named():
    x = mx.zeros((2, 6))
    with pytest.raises(ValueError, match=r"\[rms_norm\] weight has shape \(5,\)"):
        ops.rms_norm(x, mx.zeros((5,)))
    with pytest.raises(ValueError, match=r"\[add_rms_norm\] delta has shape \(1, 6\)"):
        ops.add_rms_norm(x, x[:1], mx.zeros((6,)))
