"""Short runs of elementwise operations: one launch each on a GPU, plain operations on a CPU.

`mx.compile` joins them. On a Linux CPU it would call the system's C++ compiler for each, which
costs more than it saves.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import mlx.core as mx
import numpy as np

from mlx_rgemma.ops import kernels, loops
from mlx_rgemma.ops.exponential import LOG2_E, exp2, tanh
from mlx_rgemma.ops.fused import custom_function
from mlx_rgemma.ops.lanes import in_halves
from mlx_rgemma.ops.processor import on_linux_cpu

marker: Callable[[str, Callable[..., mx.array]], Callable[..., mx.array]] | None = None
"""While launches are counted: what makes of a name and a function one node of the graph."""


def joined_on_gpu(
    on_cpu: Callable[..., mx.array] | None = None,
) -> Callable[[Callable[..., mx.array]], Callable[..., mx.array]]:
    """Compile a function of arrays where kernels run on a GPU.

    Args:
        on_cpu: What takes the function's place on a Linux CPU.
    """

    def decorate(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
        compiled = mx.compile(function, shapeless=True)

        @functools.wraps(function)
        def run(*arrays: mx.array) -> mx.array:
            if marker is not None:
                return marker(function.__name__, function)(*arrays)
            if mx.default_device().type == mx.gpu or kernels.mode() == "metal":
                return compiled(*arrays)
            return on_cpu(*arrays) if on_cpu is not None and on_linux_cpu() else function(*arrays)

        return run

    return decorate


SLOPE, CUBE = 2.0 * math.sqrt(2.0 / math.pi), 0.044715
"""GELU is approximately ``x sigmoid(SLOPE (x + CUBE x^3))``, which its paper writes with tanh."""


def _gated_gelu_on_cpu(gate: mx.array, x: mx.array) -> mx.array:
    ready = loops.ready(gate, x) if loops.worthwhile(gate) else None
    if ready is None:
        y: mx.array = _gated_gelu_by_powers(gate, x)[0]
        return y
    product = np.empty(gate.size, np.float32)
    loops.run("gated_gelu", gate.size, *(z.reshape(-1) for z in ready), product)
    return mx.array(product).reshape(gate.shape).astype(gate.dtype)


@custom_function
def _gated_gelu_by_powers(gate, x):
    """-> `gated_gelu`, and the sigmoid in it for the backward pass."""
    y, share = in_halves(_gelu_product, gate.astype(mx.float32), x.astype(mx.float32))
    return y.astype(gate.dtype), share


def _gelu_product(g: mx.array, x: mx.array) -> tuple[mx.array, mx.array]:
    share = mx.reciprocal(1.0 + exp2(g * (-SLOPE * LOG2_E - SLOPE * LOG2_E * CUBE * (g * g))))
    return g * share * x, share


@_gated_gelu_by_powers.vjp
def _gated_gelu_by_powers_vjp(primals, cotangents, outputs):
    (gate, x), share = primals, outputs[1]
    arrays = (z.astype(mx.float32) for z in (gate, x, cotangents[0]))
    dg, dx = in_halves(_gelu_gradients, share, *arrays)
    return dg.astype(gate.dtype), dx.astype(x.dtype)


def _gelu_gradients(
    share: mx.array, g: mx.array, x: mx.array, dy: mx.array
) -> tuple[mx.array, mx.array]:
    gelu = g * share
    slope = share + gelu * (1.0 - share) * (SLOPE + 3.0 * SLOPE * CUBE * (g * g))
    return dy * x * slope, dy * gelu


@joined_on_gpu(_gated_gelu_on_cpu)
def gated_gelu(gate: mx.array, x: mx.array) -> mx.array:
    """``gelu(gate) * x`` with GELU's tanh approximation, in fp32, returned in the dtype of `gate`.

    Gaussian error linear units (arXiv:1606.08415, section 2).
    """
    g = gate.astype(mx.float32)
    curve = mx.tanh(SLOPE / 2.0 * (g + CUBE * g * g * g))
    return (0.5 * g * (1.0 + curve) * x.astype(mx.float32)).astype(gate.dtype)


@joined_on_gpu()
def add_to_stream(x: mx.array, delta: mx.array) -> mx.array:
    """The fp32 residual stream with what a block adds to it."""
    return x + delta.astype(mx.float32)


@joined_on_gpu(lambda logits, cap: tanh(logits.astype(mx.float32) / cap) * cap)
def soft_cap(logits: mx.array, cap: mx.array) -> mx.array:
    """``cap * tanh(logits / cap)`` in fp32 (Gemma 2, arXiv:2408.00118, section 2).

    By a tanh that is accurate near 0: a large cap multiplies its error.
    """
    return mx.tanh(logits.astype(mx.float32) / cap) * cap
