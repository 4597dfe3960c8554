"""Short runs of elementwise operations: one launch each on a GPU, plain operations on a CPU.

`mx.compile` joins them. On a Linux CPU it would call the system's C++ compiler for each, which
costs more than it saves.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import mlx.core as mx

from mlx_rgemma.ops import kernels

marker: Callable[[str, Callable[..., mx.array]], Callable[..., mx.array]] | None = None
"""While launches are counted: what makes of a name and a function one node of the graph."""


def joined_on_gpu(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Compile a function of arrays where kernels run on a GPU."""
    compiled = mx.compile(function, shapeless=True)

    @functools.wraps(function)
    def run(*arrays: mx.array) -> mx.array:
        if marker is not None:
            return marker(function.__name__, function)(*arrays)
        on_gpu = mx.default_device().type == mx.gpu or kernels.mode() == "metal"
        return compiled(*arrays) if on_gpu else function(*arrays)

    return run


@joined_on_gpu
def gated_gelu(gate: mx.array, x: mx.array) -> mx.array:
    """``gelu(gate) * x`` with GELU's tanh approximation, in fp32, returned in the dtype of `gate`.

    Gaussian error linear units (arXiv:1606.08415, section 2).
    """
    g = gate.astype(mx.float32)
    curve = mx.tanh(math.sqrt(2.0 / math.pi) * (g + 0.044715 * g * g * g))
    return (0.5 * g * (1.0 + curve) * x.astype(mx.float32)).astype(gate.dtype)


@joined_on_gpu
def add_to_stream(x: mx.array, delta: mx.array) -> mx.array:
    """The fp32 residual stream with what a block adds to it."""
    return x + delta.astype(mx.float32)


@joined_on_gpu
def soft_cap(logits: mx.array, cap: mx.array) -> mx.array:
    """``cap * tanh(logits / cap)`` in fp32 (Gemma 2, arXiv:2408.00118, section 2)."""
    return mx.tanh(logits.astype(mx.float32) / cap) * cap
