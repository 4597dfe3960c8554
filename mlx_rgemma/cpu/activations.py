"""Gated GELU and soft cap: a Numba kernel for a prompt, polynomials elsewhere."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlx_rgemma.cpu import numba_runtime
from mlx_rgemma.cpu.arrays import empty, materialize
from mlx_rgemma.cpu.eager import eager
from mlx_rgemma.cpu.fastmath import LOG2_E, exp2, tanh
from mlx_rgemma.cpu.streams import split_across_streams
from mlx_rgemma.ops.activations import GELU_CUBE, GELU_SLOPE, gated_gelu, soft_cap
from mlx_rgemma.ops.backend import Backend


@gated_gelu.implementation(Backend.CPU, supports=numba_runtime.is_long, gradient="none")
def numba_gated_gelu(gate: mx.array, x: mx.array) -> Any:
    views = materialize(gate, x)
    if views is None:
        return NotImplemented
    y, out = empty((gate.size,))
    numba_runtime.run("gated_gelu", gate.size, *(view.reshape(-1) for view in views), out)
    return y.reshape(gate.shape).astype(gate.dtype)


@gated_gelu.implementation(Backend.CPU, gradient="own")
def differentiable_gated_gelu(gate: mx.array, x: mx.array) -> mx.array:
    y: mx.array = _gated_gelu(gate, x)[0]
    return y


def _gated_gelu_gradient(primals, cotangents, outputs):
    (gate, x), share = primals, outputs[1]
    arrays = (z.astype(mx.float32) for z in (gate, x, cotangents[0]))
    dg, dx = split_across_streams(_gelu_gradients, share, *arrays)
    return dg.astype(gate.dtype), dx.astype(x.dtype)


@eager(_gated_gelu_gradient)
def _gated_gelu(gate, x):
    """-> `gated_gelu`, and the sigmoid in it for the backward pass."""
    y, share = split_across_streams(_gelu_product, gate.astype(mx.float32), x.astype(mx.float32))
    return y.astype(gate.dtype), share


def _gelu_product(g: mx.array, x: mx.array) -> tuple[mx.array, mx.array]:
    slope = GELU_SLOPE * LOG2_E
    share = mx.reciprocal(1.0 + exp2(g * (-slope - slope * GELU_CUBE * (g * g))))
    return g * share * x, share


def _gelu_gradients(
    share: mx.array, g: mx.array, x: mx.array, dy: mx.array
) -> tuple[mx.array, mx.array]:
    gelu = g * share
    slope = share + gelu * (1.0 - share) * (GELU_SLOPE + 3.0 * GELU_SLOPE * GELU_CUBE * (g * g))
    return dy * x * slope, dy * gelu


@soft_cap.implementation(Backend.CPU, gradient="own")
@eager()
def fast_soft_cap(logits: mx.array, cap: mx.array) -> mx.array:
    return tanh(logits.astype(mx.float32) / cap) * cap
