"""The Linux CPU backend: products by NumPy, Numba kernels where numba is installed.

`mlx_rgemma.ops.backend` imports this package by name, on Linux only, and nothing else does. It
registers implementations of operations, and has three hooks for more than an operation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mlx.nn as nn

from mlx_rgemma.cpu import (  # noqa: F401  (they register their implementations)
    activations,
    attention,
    causal_conv1d,
    cross_entropy,
    linear,
    rg_lru,
    rms_norm,
)
from mlx_rgemma.cpu.eager import detach
from mlx_rgemma.cpu.layers import replace_linear_layers
from mlx_rgemma.cpu.numba_runtime import compile_seconds

if TYPE_CHECKING:
    import mlx.optimizers as optim

    from mlx_rgemma.cpu.decode_step import Decoder


__all__ = ["compile_seconds", "decoder", "detach", "optimizer", "prepare"]


def prepare(model: nn.Module, *, dequantize: bool = True) -> int:
    """Multiply by NumPy in all layers of a model, and dequantize weights where there is room.

    Args:
        model: A `griffin.model.Model`, with its projections fused, if they are to be.
        dequantize: Keep quantized weights in float32 too, where that is faster and there is room.

    Returns:
        Bytes of the dequantized weights.
    """
    from mlx_rgemma.cpu.dequantize import cache_dequantized
    from mlx_rgemma.griffin.fused_projection import FusedInputBlock

    replace_linear_layers(model)
    for module in model.modules():
        if isinstance(module, FusedInputBlock) and (fused := module.fused_projection()):
            replace_linear_layers(fused.layer)
    return cache_dequantized(model) if dequantize else 0


def decoder(model: Any) -> Decoder | None:
    """Return decode steps of a model by Numba kernels; None where they do not serve."""
    from mlx_rgemma.cpu import numba_runtime

    if not numba_runtime.available():
        return None
    from mlx_rgemma.cpu.decode_step import decoder_of

    return decoder_of(model)


def optimizer(inner: optim.Optimizer) -> optim.Optimizer:
    """Return an optimizer whose Adam updates run in one pass."""
    from mlx_rgemma.cpu.adam import fuse_adam

    return fuse_adam(inner)
