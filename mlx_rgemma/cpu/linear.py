"""Matrix products by NumPy, dense and quantized, with gradients of their own.

Products are computed at once: their inputs are evaluated, and an unused gradient would be computed
too. So a weight without a gradient is passed as frozen.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_rgemma.cpu.arrays import View, empty, ignore_overflow, materialize
from mlx_rgemma.ops.autograd import is_inference
from mlx_rgemma.ops.backend import Backend
from mlx_rgemma.ops.linear import BLOCK_DIAGONAL

MIN_ROWS = 4
"""Rows from which on NumPy is faster: below, MLX multiplies by vectors without a BLAS."""

DEQUANTIZED_AT_ONCE = 1 << 20
"""Quantized weights that are dequantized at once for a product."""

DEQUANTIZE_ROWS = {"affine": 5, "mxfp4": 20, "nvfp4": 20, "mxfp8": 3}
"""Rows from which on dequantizing first is faster than MLX's product, by mode: that takes 0.9 ns
per weight and row, dequantizing 3.3 ns per weight."""


def linear(
    x: mx.array, weight: mx.array, bias: mx.array | None = None, *, frozen: bool = True
) -> mx.array:
    """Return ``x @ weight.T + bias``.

    Args:
        x: (..., in), any float.
        weight: (out, in).
        bias: (out,).
        frozen: Whether neither weight nor bias has a gradient.

    Returns:
        (..., out), dtype of `x`.
    """
    outputs = weight.shape[0]
    if x.size < MIN_ROWS * x.shape[-1]:
        return _fallback(x, weight, bias)
    if is_inference():
        y = _forward(x, weight, bias)
        return _fallback(x, weight, bias) if y is None else y
    if frozen:
        # The weight stays outside of the function: its gradient would be computed otherwise.
        function = _product(outputs, lambda x: (x, weight, bias), ("x",))
        arrays = [x]
    elif bias is None:
        function = _product(outputs, lambda x, weight: (x, weight, None), ("x", "weight"))
        arrays = [x, weight]
    else:
        function = _product(outputs, lambda *arrays: arrays, ("x", "weight", "bias"))
        arrays = [x, weight, bias]
    y = function(*arrays)
    return y


def _product(outputs: int, arguments: Any, primal_names: tuple[str, ...]) -> Any:
    @mx.custom_function
    def product(*primals: mx.array) -> mx.array:
        x, weight, bias = arguments(*primals)
        y = _forward(x, weight, bias)
        return _fallback(x, weight, bias) if y is None else y

    @product.vjp
    def gradient(primals: Any, cotangent: mx.array, _output: mx.array) -> Any:
        primals = primals if isinstance(primals, list | tuple) else [primals]
        x, weight, _ = arguments(*primals)
        views = materialize(x, weight, cotangent)
        if views is None:
            x, g = x.reshape(-1, x.shape[-1]), cotangent.reshape(-1, outputs)
            found = {"x": g @ weight, "weight": g.T @ x, "bias": g.sum(axis=0)}
        else:
            rows, w = views[0].reshape(-1, x.shape[-1]), views[1]
            dy = views[2].reshape(-1, outputs)
            found = {"x": _matmul(dy, w)}
            if "weight" in primal_names:
                found["weight"] = _matmul(dy.T, rows)
            if "bias" in primal_names:
                found["bias"] = mx.array(dy.sum(axis=0))
        shapes = zip(primal_names, primals, strict=True)
        return tuple(found[name].reshape(p.shape).astype(p.dtype) for name, p in shapes)

    return product


@ignore_overflow
def _forward(x: mx.array, weight: mx.array, bias: mx.array | None) -> mx.array | None:
    views = materialize(x, weight, *([] if bias is None else [bias]))
    if views is None:
        return None
    y, view = empty((x.size // x.shape[-1], weight.shape[0]))
    np.matmul(views[0].reshape(-1, x.shape[-1]), views[1].T, out=view)
    if bias is not None:
        view += views[2]
    return y.reshape(*x.shape[:-1], -1).astype(x.dtype)


def _fallback(x: mx.array, weight: mx.array, bias: mx.array | None) -> mx.array:
    return x @ weight.T if bias is None else mx.addmm(bias, x, weight.T)


@ignore_overflow
def _matmul(a: View, b: View) -> mx.array:
    y, view = empty((*a.shape[:-1], b.shape[-1]))
    np.matmul(a, b, out=view)
    return y


class Quantized(NamedTuple):
    """A matrix that `mx.quantize` packed: ``{"group_size":, "bits":, "mode":}`` say how."""

    weight: mx.array
    scales: mx.array
    biases: mx.array | None
    how: dict[str, Any]

    @property
    def inputs(self) -> int:
        return int(self.weight.shape[1]) * 32 // int(self.how["bits"])

    def blocks(self) -> Iterator[tuple[slice, mx.array]]:
        """Yield some rows at a time, dequantized in fp32 and evaluated."""
        outputs, size = self.weight.shape[0], max(DEQUANTIZED_AT_ONCE // self.inputs, 1)
        for first in range(0, outputs, size):
            block = slice(first, min(first + size, outputs))
            rows: Any = [z[block] for z in self[:3] if isinstance(z, mx.array)]
            values = mx.dequantize(*rows, **self.how).astype(mx.float32)
            mx.eval(values)
            yield block, values

    def dequantized(self) -> mx.array:
        """Return (out, in), fp32, made in little more than its own memory."""
        matrix, view = empty((self.weight.shape[0], self.inputs))
        for block, values in self.blocks():
            view[block] = np.asarray(values)
        return matrix


def quantized_linear(x: mx.array, packed: Quantized) -> mx.array:
    """Return ``x @ W.T`` of a quantized W, which has no gradient: (..., in) -> (..., out)."""
    rows = x.size // x.shape[-1]
    if rows >= DEQUANTIZE_ROWS.get(packed.how["mode"], DEQUANTIZE_ROWS["affine"]):
        if is_inference():
            y = _quantized_forward(x, packed)
            if y is not None:
                return y
        else:
            result: mx.array = _quantized_product(packed)(x)
            return result
    weights = packed.weight, packed.scales, packed.biases
    return mx.quantized_matmul(x, *weights, transpose=True, **packed.how)


@ignore_overflow
def _quantized_forward(x: mx.array, packed: Quantized) -> mx.array | None:
    views = materialize(x)
    if views is None:
        return None
    rows = views[0].reshape(-1, x.shape[-1])
    y, view = empty((len(rows), packed.weight.shape[0]))
    for block, values in packed.blocks():
        view[:, block] = rows @ np.asarray(values).T
    return y.reshape(*x.shape[:-1], -1).astype(x.dtype)


def _quantized_product(packed: Quantized) -> Any:
    @mx.custom_function
    def product(x: mx.array) -> mx.array:
        y = _quantized_forward(x, packed)
        if y is not None:
            return y
        weights = packed.weight, packed.scales, packed.biases
        return mx.quantized_matmul(x, *weights, transpose=True, **packed.how)

    @product.vjp
    def gradient(x: mx.array, cotangent: mx.array, _output: mx.array) -> mx.array:
        views = materialize(cotangent)
        if views is None:
            return cotangent @ mx.dequantize(*packed[:3], **packed.how)
        dy = views[0].reshape(-1, packed.weight.shape[0])
        dx, view = empty((len(dy), packed.inputs))
        for block, values in packed.blocks():
            view += dy[:, block] @ np.asarray(values)
        return dx.reshape(x.shape).astype(x.dtype)

    return product


def _has_many_rows(x: mx.array, _weight: mx.array) -> bool:
    return x.size >= MIN_ROWS * x.shape[-1]


@BLOCK_DIAGONAL.implementation(Backend.CPU, supports=_has_many_rows, gradient="own")
def block_diagonal(x: mx.array, weight: mx.array) -> Any:
    """Multiply each head's channels with its own matrix."""
    if is_inference():
        return _block_forward(x, weight)
    return _block_product(x, weight)


@ignore_overflow
def _block_forward(x: mx.array, weight: mx.array) -> Any:
    views = materialize(x, weight)
    if views is None:
        return NotImplemented
    heads, size, _ = weight.shape
    y, view = empty((x.size // x.shape[-1], heads, size))
    np.matmul(_by_head(views[0], heads), views[1], out=view.swapaxes(0, 1))
    return y.reshape(x.shape).astype(x.dtype)


def _by_head(x: View, heads: int) -> View:
    """(..., D) -> (heads, rows, D / heads), a view."""
    return x.reshape(-1, heads, x.shape[-1] // heads).swapaxes(0, 1)


@mx.custom_function
def _block_product(x: mx.array, weight: mx.array) -> mx.array:
    y = _block_forward(x, weight)
    return BLOCK_DIAGONAL.reference(x, weight) if y is NotImplemented else y


@_block_product.vjp
def _block_product_vjp(primals: Any, cotangent: mx.array, _output: mx.array) -> Any:
    x, weight = primals
    views = materialize(x, weight, cotangent)
    if views is None:
        return mx.vjp(BLOCK_DIAGONAL.reference, [x, weight], [cotangent])[1]
    heads, size, _ = weight.shape
    rows, dy = _by_head(views[0], heads), _by_head(views[2], heads)
    dx, view = empty((x.size // x.shape[-1], heads, size))
    np.matmul(dy, views[1].swapaxes(1, 2), out=view.swapaxes(0, 1))
    dweight = _matmul(rows.swapaxes(1, 2), dy)
    return dx.reshape(x.shape).astype(x.dtype), dweight.astype(weight.dtype)
