"""Matrix products by NumPy, beside float64 and MLX's own."""

from __future__ import annotations

from contextlib import nullcontext

import mlx.core as mx
import numpy as np
import pytest
from helpers.assertions import relative_error

from mlx_rgemma.cpu import linear as linear_module
from mlx_rgemma.cpu.linear import MIN_ROWS, Quantized, linear, quantized_linear
from mlx_rgemma.ops import block_diagonal, inference_mode


def gradient(function, *arrays):
    """Gradients of a sum that weighs each output differently."""

    def total(*arrays):
        y = function(*arrays).astype(mx.float32)
        return (y * mx.cos(mx.arange(y.size).reshape(y.shape))).sum()

    return mx.grad(total, argnums=list(range(len(arrays))))(*arrays)


@pytest.mark.parametrize("shape", [(1, 512), (2, 4, 512), (9, 512), (1, 1, 7000)], ids=str)
@pytest.mark.parametrize("outputs", [1, 37, 1200, 3072])
@pytest.mark.parametrize("mode", ["inference", "frozen", "trained"])
def test_linear_multiplies(shape, outputs, mode):
    x = mx.random.normal(shape, key=mx.random.key(0))
    weight = mx.random.normal((outputs, shape[-1]), key=mx.random.key(1))
    bias = mx.random.normal((outputs,), key=mx.random.key(2))
    exact = np.array(x, np.float64) @ np.array(weight, np.float64).T + np.array(bias)
    with inference_mode() if mode == "inference" else nullcontext():
        assert relative_error(linear(x, weight, bias, frozen=mode != "trained"), exact) < 3e-6
    if mode == "inference":
        return
    if mode == "frozen":
        ours = gradient(lambda x: linear(x, weight, bias), x)
        its = gradient(lambda x: x @ weight.T + bias, x)
    else:
        ours = gradient(lambda *arrays: linear(*arrays, frozen=False), x, weight, bias)
        its = gradient(lambda x, w, b: x @ w.T + b, x, weight, bias)
    for one, other in zip(ours, its, strict=True):
        assert relative_error(one, np.array(other)) < 3e-6


def test_a_gradient_that_is_not_needed_is_not_computed(monkeypatch):
    """Eager products cannot be skipped later: a frozen weight must not have one."""
    shapes = []
    multiply = linear_module._matmul
    monkeypatch.setattr(
        linear_module,
        "_matmul",
        lambda a, b: (shapes.append((a.shape, b.shape)), multiply(a, b))[1],
    )
    x, weight = mx.random.normal((8, 16)), mx.random.normal((32, 16))
    mx.grad(lambda x: linear(x, weight).sum())(x)
    assert shapes == [((8, 32), (32, 16))]
    mx.grad(lambda x, w: linear(x, w, frozen=False).sum(), argnums=(0, 1))(x, weight)
    assert shapes[1:] == [((8, 32), (32, 16)), ((32, 8), (8, 16))]


@pytest.mark.parametrize("rows", [1, MIN_ROWS - 1, MIN_ROWS, 40])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("inference", [True, False])
def test_block_diagonal_products(rows, dtype, inference):
    x = mx.random.normal((2, rows, 48), key=mx.random.key(0)).astype(dtype)
    weight = mx.random.normal((3, 16, 16), key=mx.random.key(1)).astype(dtype)
    blocks = np.array(x.astype(mx.float32), np.float64).reshape(2, rows, 3, 16)
    exact = np.einsum("blhi,hij->blhj", blocks, np.array(weight.astype(mx.float32), np.float64))
    bound = 3e-6 if dtype == mx.float32 else 1e-2
    with inference_mode() if inference else nullcontext():
        found = block_diagonal(x, weight)
    assert found.dtype == dtype
    assert relative_error(found.astype(mx.float32), exact.reshape(2, rows, 48)) < bound
    if not inference and dtype == mx.float32:
        its = gradient(lambda x, w: (x.reshape(2, rows, 3, 1, 16) @ w).reshape(x.shape), x, weight)
        for one, other in zip(gradient(block_diagonal, x, weight), its, strict=True):
            assert relative_error(one, np.array(other)) < 3e-6


@pytest.mark.parametrize("trace", [mx.compile, mx.vmap], ids=["compile", "vmap"])
def test_without_values_products_are_mlx_own(trace):
    x, weight = mx.random.normal((3, 8, 16)), mx.random.normal((32, 16))
    found = trace(lambda x: linear(x, weight))(x)
    assert relative_error(found, np.array(x) @ np.array(weight).T) < 3e-6


@pytest.mark.parametrize("bits", [4, 5])
def test_weights_are_dequantized_in_little_more_than_their_own_memory(bits):
    how = {"group_size": 64, "bits": bits, "mode": "affine"}
    weight = mx.random.normal((8192, 2560), key=mx.random.key(0))
    quantized = mx.quantize(weight, **how)
    mx.eval(quantized)
    expected = np.array(mx.dequantize(*quantized, **how))
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    dequantized = Quantized(*quantized, how).dequantized()
    assert np.array_equal(np.array(dequantized), expected)
    assert mx.get_peak_memory() - before < 1.5 * dequantized.nbytes


@pytest.mark.parametrize("at_once", [256, 96 * 256], ids=["row by row", "whole"])
@pytest.mark.parametrize("mode, bits", [("affine", 4), ("affine", 8), ("mxfp4", 4), ("mxfp8", 8)])
@pytest.mark.parametrize("rows", [1, 4, 5, 20, 40])
def test_quantized_products_agree_with_mlx(mode, bits, rows, at_once, monkeypatch):
    monkeypatch.setattr(linear_module, "DEQUANTIZED_AT_ONCE", at_once)
    group_size = 64 if mode == "affine" else 32
    how = {"group_size": group_size, "bits": bits, "mode": mode}
    x = mx.random.normal((rows, 256), key=mx.random.key(0))
    weight = mx.random.normal((96, 256), key=mx.random.key(1))
    quantized = mx.quantize(weight, **how)
    packed, scales, biases = (*quantized, None)[:3]
    expected = mx.quantized_matmul(x, packed, scales, biases, transpose=True, **how)
    got = quantized_linear(x, Quantized(packed, scales, biases, how))
    assert relative_error(got, np.array(expected)) < 3e-6
    ours = gradient(lambda x: quantized_linear(x, Quantized(packed, scales, biases, how)), x)[0]
    its = gradient(
        lambda x: mx.quantized_matmul(x, packed, scales, biases, transpose=True, **how), x
    )[0]
    assert relative_error(ours, np.array(its)) < 3e-6
