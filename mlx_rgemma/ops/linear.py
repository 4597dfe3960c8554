"""Products of activations and weights, plain or quantized, at a Linux CPU's pace.

Three things that MLX leaves on the table there, measured on a 2.6 GHz x86-64 with OpenBLAS:

* One row times a matrix is bound by reading the matrix, yet the BLAS first copies it into panels.
  Cut into blocks of which each is small enough for its direct kernel, the products of a decode
  step of 40 million parameters take 13 ms for 19. That kernel reads short rows slowly (13 GB/s of
  512 inputs, 26 of 7,680): a narrow matrix is read at 22 GB/s from a copy in tiles, which lie as
  the kernel goes through them. OpenBLAS has such kernels for AVX-512. Without it, a narrow matrix
  is one tile, its transpose: that is copied into panels at 9 GB/s, the matrix itself at 6.
* The gradient of a weight comes out transposed, and every operation of an optimizer on it takes
  several times as long. Here it lies as the weight does.
* Multiplying with quantized weights takes 0.9 ns an element and row, expanding them 3.3 ns an
  element whatever the rows: from a few rows on, expanding first is faster.

On a GPU, and on a Mac, MLX's own operations are used as they are.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_rgemma.ops.fused import custom_function
from mlx_rgemma.ops.processor import has_avx512, on_linux_cpu

FEW_ROWS = 8
"""Most rows that are multiplied block by block."""
BLOCK_OUTPUTS, BLOCK_PRODUCTS = 1200, 10**6
"""Limits of OpenBLAS's kernels for small matrices, which read them in place."""

TILE_OUTPUTS = 64
"""Outputs of a tile: what OpenBLAS's kernel for small matrices, for AVX-512, computes at once."""
TILE_INPUTS, TILE_ELEMENTS = 1024, 1 << 23
"""Most inputs and elements of a matrix that is laid out in tiles: with more inputs its rows are so
long that they are read nearly as fast, and the copy would be large."""

EXPANDED_AT_ONCE = 1 << 20
"""Quantized weights that are expanded at once for a product."""

EXPAND_ROWS = {"affine": 5, "mxfp4": 20, "nvfp4": 20, "mxfp8": 3}
"""Rows from which on quantized weights are expanded first, by mode."""


def linear(
    x: mx.array,
    weight: mx.array,
    bias: mx.array | None = None,
    tiles: mx.array | None = None,
) -> mx.array:
    """``x @ weight.T + bias``.

    Args:
        x: (..., in), any float.
        weight: (out, in).
        bias: (out,).
        tiles: From `tiled`, instead of the weight; without a gradient.

    Returns:
        (..., out), dtype of the product.
    """
    if not on_linux_cpu() or weight.dtype != mx.float32 or x.dtype != mx.float32:
        return x @ weight.T if bias is None else mx.addmm(bias, x, weight.T)
    rows = x.reshape(-1, x.shape[-1])
    product = _linear(rows, weight) if tiles is None else _tiles_product(rows, tiles)
    y = product.reshape(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias


def tiled(weight: mx.array) -> mx.array:
    """A copy of a weight for products of few rows: (out, in) -> (tiles, in, outputs of a tile)."""
    outputs, inputs = weight.shape
    size = TILE_OUTPUTS if has_avx512() else outputs
    return mx.contiguous(weight.reshape(-1, size, inputs).swapaxes(1, 2))


def tiles_pay(x: mx.array, weight: mx.array) -> bool:
    """Whether the product of these is faster with tiles."""
    if not on_linux_cpu():
        return False
    outputs, inputs = weight.shape
    return (
        x.size <= FEW_ROWS * inputs
        and inputs <= TILE_INPUTS
        and weight.size <= TILE_ELEMENTS
        and (outputs % TILE_OUTPUTS == 0 or not has_avx512())
        and weight.dtype == x.dtype == mx.float32
    )


def _tiles_product(x: mx.array, tiles: mx.array) -> mx.array:
    return (x[None] @ tiles).swapaxes(0, 1).reshape(x.shape[0], -1)


@custom_function
def _linear(x: mx.array, weight: mx.array) -> mx.array:
    rows, inputs = x.shape
    outputs = weight.shape[0]
    blocks = _blocks(rows, outputs, inputs)
    if blocks == 1:
        return x @ weight.T
    parts = x[None] @ weight.reshape(blocks, -1, inputs).swapaxes(1, 2)
    return parts.swapaxes(0, 1).reshape(rows, outputs)


@_linear.vjp
def _linear_vjp(primals, cotangent, _output):
    x, weight = primals
    return cotangent @ weight, cotangent.T @ x


@lru_cache(maxsize=256)
def _blocks(rows: int, outputs: int, inputs: int) -> int:
    """Into how many blocks of its outputs to cut a product; 1 for none."""
    if rows > FEW_ROWS:
        return 1
    most = min(BLOCK_OUTPUTS, BLOCK_PRODUCTS // inputs) // rows
    least = -(-outputs // max(most, 1))
    # Blocks of fewer than 16 outputs would cost more in calls than they save.
    for blocks in range(least, outputs // 16 + 1):
        if outputs % blocks == 0:
            return blocks
    return 1


def quantized_linear(
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    *,
    group_size: int,
    bits: int,
    mode: str,
) -> mx.array:
    """``x @ W.T`` with W quantized by `mx.quantize`.

    Args:
        x: (..., in), any float.
        weight: (out, in * bits / 32), uint32.
        scales, biases: (out, in / group_size); no biases in a mode without them.
        group_size, bits, mode: As given to `mx.quantize`.

    Returns:
        (..., out), dtype of the product.
    """
    how: dict[str, Any] = {"group_size": group_size, "bits": bits, "mode": mode}
    rows = x.size // x.shape[-1]
    if not on_linux_cpu() or rows < EXPAND_ROWS.get(mode, EXPAND_ROWS["affine"]):
        return mx.quantized_matmul(x, weight, scales, biases, transpose=True, **how)
    # Of float32 activations: a Linux CPU multiplies the half precisions forty times slower.
    product = _expanding_product(_Quantized(weight, scales, biases, how))
    y = product(x.astype(mx.float32).reshape(rows, -1))
    return y.reshape(*x.shape[:-1], weight.shape[0]).astype(x.dtype)


def expand_quantized(
    weight: mx.array, scales: mx.array, biases: mx.array | None, **how: Any
) -> mx.array:
    """The weights that `mx.quantize` packed, (out, in), fp32, in little more than their own memory.

    `mx.dequantize` takes up to five times as much on a CPU.

    Args:
        weight, scales, biases, **how: As for `quantized_linear`.
    """
    packed = _Quantized(weight, scales, biases, how)
    expanded = mx.zeros((weight.shape[0], packed.inputs))
    for block in packed.blocks():
        expanded[block] = packed.expand(block)
        mx.eval(expanded)
    return expanded


class _Quantized(NamedTuple):
    """A quantized matrix, and how it is expanded: some rows at a time."""

    weight: mx.array
    scales: mx.array
    biases: mx.array | None
    how: dict[str, Any]

    @property
    def inputs(self) -> int:
        return self.weight.shape[1] * 32 // self.how["bits"]

    def blocks(self) -> list[slice]:
        """Rows that are expanded at once."""
        outputs, size = self.weight.shape[0], max(EXPANDED_AT_ONCE // self.inputs, 1)
        return [slice(i, min(i + size, outputs)) for i in range(0, outputs, size)]

    def expand(self, block: slice, after: mx.array | None = None) -> mx.array:
        """Some rows, fp32; once another array is there, since MLX runs ahead of what it frees."""
        rows = [z[block] for z in self[:3] if isinstance(z, mx.array)]
        rows = rows if after is None else mx.depends(rows, [after])
        return mx.dequantize(*rows, **self.how).astype(mx.float32)


def _expanding_product(packed: _Quantized) -> custom_function:
    """A function of x, (rows, in) fp32, that multiplies with a matrix as it is being expanded."""

    @custom_function
    def product(x: mx.array) -> mx.array:
        found: list[mx.array] = []
        for block in packed.blocks():
            expanded = packed.expand(block, after=found[-1] if found else None)
            found.append(_linear.function(x, expanded))
        return found[0] if len(found) == 1 else mx.concatenate(found, axis=-1)

    @product.vjp
    def gradient(x, cotangent, _output):
        total = None
        for block in packed.blocks():
            part = cotangent[:, block] @ packed.expand(block, after=total)
            total = part if total is None else total + part
        return total

    return product
