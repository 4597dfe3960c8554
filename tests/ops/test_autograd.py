"""Gradients of implementations that have none of their own, and the mode without gradients."""

from __future__ import annotations

import threading

import mlx.core as mx
import pytest
from helpers.graphs import primitives

from mlx_rgemma import ops
from mlx_rgemma.ops import backend
from mlx_rgemma.ops.autograd import (
    custom_function,
    inference_mode,
    is_inference,
    with_reference_gradient,
)
from mlx_rgemma.ops.backend import Backend

X, W, I = mx.array([1.0, 2.0, 3.0]), mx.array([0.5, -1.0, 2.0]), mx.array([2, 0, 1])  # noqa: E741


@pytest.fixture
def function():
    """A function with the gradient of its reference; it returns 100 more, and counts its calls."""

    def reference(x, w=None, index=None, *, power=2):
        y = x**power if w is None else x**power * w
        return (y if index is None else y[index]), y.sum()

    def run(x, w=None, index=None, *, power=2):
        calls.append(power)
        return tuple(y + 100.0 for y in reference(x, w, index, power=power))

    calls: list[int] = []
    wrapped = with_reference_gradient(run, reference)
    wrapped.calls, wrapped.reference = calls, reference
    return wrapped


@pytest.mark.parametrize("arrays", [(X,), (X, W), (X, None, I), (X, W, I)], ids=str)
@pytest.mark.parametrize("power", [2, 3])
def test_the_gradient_is_the_references(function, arrays, power):
    floats = [i for i, x in enumerate(arrays) if x is not None and x.dtype == mx.float32]

    def loss(f, *values):
        full = list(arrays)
        for place, value in zip(floats, values, strict=True):
            full[place] = value
        y, total = f(*full, power=power)
        return (y * mx.arange(1.0, 4.0)).sum() + total

    values = [arrays[i] for i in floats]
    argnums = tuple(range(1, 1 + len(values)))
    value, got = mx.value_and_grad(loss, argnums=argnums)(function, *values)
    exact, expected = mx.value_and_grad(loss, argnums=argnums)(function.reference, *values)
    assert value.item() == exact.item() + 100.0 * (1 + 2 + 3) + 100.0
    assert all(mx.allclose(a, b) for a, b in zip(got, expected, strict=True))
    assert function.calls == [power]


def test_integer_arrays_have_a_gradient_of_zero(function):
    def outputs(x, index):
        return function(x, None, index)

    cotangents = [mx.ones((3,)), mx.array(0.0)]
    _, (dx, d_index) = mx.vjp(outputs, [X, I], cotangents)
    assert mx.array_equal(dx, 2.0 * X)
    assert not mx.any(d_index)


@pytest.mark.parametrize("axes", [(0, None), (0, 0), (1, 0)], ids=str)
def test_vmap_is_that_of_the_reference(function, axes):
    x = mx.stack([X, 2.0 * X], axis=axes[0])
    w = W if axes[1] is None else mx.stack([W, -W])
    y, total = mx.vmap(lambda x, w: function(x, w), in_axes=axes)(x, w)
    for row in range(2):
        one = x[row] if axes[0] == 0 else x[:, row]
        expected = function.reference(one, W if axes[1] is None else w[row])
        assert mx.allclose(y[row], expected[0])
        assert mx.allclose(total[row], expected[1])


def test_vmap_of_one_output():
    square = with_reference_gradient(lambda x: x * x, lambda x: x * x)
    assert mx.array_equal(mx.vmap(square)(mx.stack([X, W])), mx.stack([X * X, W * W]))


def test_in_inference_mode_it_is_the_bare_function(function):
    with inference_mode():
        y, _ = function(X)
        # Its own operations are differentiated, as MLX does by itself.
        slope = mx.grad(lambda x: function(x)[0].sum())(X)
    assert mx.array_equal(y, X * X + 100.0)
    assert mx.allclose(slope, 2.0 * X)


def test_custom_function_is_bare_in_inference_mode():
    double = custom_function(lambda x: 2.0 * x)
    double.vjp(lambda primals, cotangent, outputs: 7.0 * cotangent)
    slope = mx.grad(lambda x: double(x).sum())
    assert mx.array_equal(slope(X), mx.full((3,), 7.0))
    with inference_mode():
        assert mx.array_equal(slope(X), mx.full((3,), 2.0))


def test_inference_mode_is_for_one_thread_and_nests():
    seen = []
    with inference_mode():
        with pytest.raises(KeyError), inference_mode():
            raise KeyError
        assert is_inference()
        thread = threading.Thread(target=lambda: seen.append(is_inference()))
        thread.start()
        thread.join()
    assert seen == [False]
    assert not is_inference()


# Transformations of the operations.


@pytest.mark.parametrize("compiled", [False, True], ids=["call", "compile"])
def test_graphs_are_recorded_with_kernels(compiled):
    def loss(x, gate, a_param, h0):
        y, h_last = ops.rg_lru(x, gate, gate, a_param, h0)
        return y.sum() + h_last.sum()

    x = mx.zeros((2, 40, 9))
    function = mx.compile(loss) if compiled else loss
    graph = primitives(function, x, x, mx.zeros((9,)), mx.zeros((2, 9)))
    assert graph.count("CustomKernel") == 1


def test_a_call_is_one_primitive():
    x, vector = mx.zeros((2, 40, 9)), mx.zeros((9,))
    weight, h0 = mx.zeros((9, 4, 1)), mx.zeros((2, 9))
    reset = mx.zeros((1, 40), mx.bool_)

    def rg_lru(x, gate, vector, h0, reset):
        bias = {"input_gate_bias": vector, "recurrent_gate_bias": vector}
        return ops.rg_lru(x, gate, gate, vector, h0, reset, **bias)

    def conv(x, weight, vector, state):
        return ops.causal_conv1d(x, weight, vector, state)

    for function, arrays in (
        (rg_lru, (x, x, vector, h0, reset)),
        (conv, (x, weight, vector, mx.zeros((2, 3, 9)))),
    ):
        assert primitives(function, *arrays, views=True) == ["CustomKernel"], function


@pytest.mark.parametrize("transform", ["call", "compile", "vmap"])
def test_the_reference_is_exported_and_imported(tmp_path, transform):
    def loss(x, gate, a_param, weight):
        x, _ = ops.causal_conv1d(x, weight)
        return ops.rg_lru(x, gate, gate, a_param)[0].sum()

    x = mx.random.normal((2, 20, 9), key=mx.random.key(0))
    arrays = (x, 0.5 * x, x[0, 0], mx.random.normal((9, 4, 1), key=mx.random.key(1)))
    function = {
        "call": loss,
        "compile": mx.compile(loss),
        "vmap": mx.vmap(
            lambda x, g, *rest: loss(x[None], g[None], *rest), in_axes=(0, 0, None, None)
        ),
    }[transform]
    file = str(tmp_path / "function.mlxfn")
    with backend.use(Backend.MLX):
        expected = function(*arrays)
        with inference_mode():
            mx.export_function(file, function, *arrays)
    (found,) = mx.import_function(file)(*arrays)
    assert mx.allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_vmap_of_the_reference():
    """MLX vectorizes no custom kernel: `backend.use(Backend.MLX)` is for that."""
    x = mx.random.normal((3, 2, 20, 9), key=mx.random.key(0))
    a_param = mx.random.normal((3, 9), key=mx.random.key(1))
    weight = mx.random.normal((9, 4, 1), key=mx.random.key(2))

    def layer(x, a_param):
        x, _ = ops.causal_conv1d(x, weight)
        return ops.rg_lru(x, x, x, a_param)[0]

    gradient = mx.grad(lambda *arrays: mx.square(layer(*arrays)).sum(), argnums=(0, 1))
    with backend.use(Backend.MLX):
        assert mx.allclose(mx.vmap(layer)(x, a_param)[1], layer(x[1], a_param[1]), atol=1e-6)
        many, one = mx.vmap(gradient)(x, a_param), gradient(x[1], a_param[1])
    for some, expected in zip(many, one, strict=True):
        assert mx.allclose(some[1], expected, rtol=1e-4, atol=1e-5)
