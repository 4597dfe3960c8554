"""Short chains of elementwise operations.

On a GPU `mx.compile` makes one launch of each; MLX's CPU backend would call the system's C++
compiler for it, so there they run as they are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import mlx.core as mx

from mlx_rgemma.ops.backend import Backend, Operation

GELU_SLOPE, GELU_CUBE = 2.0 * math.sqrt(2.0 / math.pi), 0.044715
"""GELU is approximately ``x sigmoid(SLOPE (x + CUBE x^3))``; its paper writes that with tanh."""


def compile_on_gpu(function: Callable[..., mx.array]) -> Operation:
    """Make an operation of a function of arrays, which is compiled on the METAL backend."""
    operation = Operation(function)
    compiled = mx.compile(function, shapeless=True)

    @operation.implementation(Backend.METAL, gradient="own")
    @functools.wraps(function)
    def run(*arrays: mx.array) -> mx.array:
        return compiled(*arrays)

    return operation


@compile_on_gpu
def gated_gelu(gate: mx.array, x: mx.array) -> mx.array:
    """Return ``gelu(gate) * x`` with GELU's tanh approximation, in the dtype of `gate`.

    Computed in fp32. Gaussian error linear units (arXiv:1606.08415, section 2).
    """
    g = gate.astype(mx.float32)
    curve = mx.tanh(GELU_SLOPE / 2.0 * (g + GELU_CUBE * g * g * g))
    return (0.5 * g * (1.0 + curve) * x.astype(mx.float32)).astype(gate.dtype)


@compile_on_gpu
def residual_add(x: mx.array, delta: mx.array) -> mx.array:
    """Return the fp32 residual stream with a block's output added."""
    return x + delta.astype(mx.float32)


@compile_on_gpu
def soft_cap(logits: mx.array, cap: mx.array) -> mx.array:
    """Return ``cap * tanh(logits / cap)`` in fp32 (Gemma 2, arXiv:2408.00118, section 2).

    Needs a tanh that is accurate near 0: a large cap multiplies its error.
    """
    return mx.tanh(logits.astype(mx.float32) / cap) * cap
