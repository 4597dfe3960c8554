"""A cache of dequantized weights: a CPU multiplies faster with float32.

The quantized arrays stay the model's parameters, which are saved, adapted and fused.
"""

from __future__ import annotations

import os

import mlx.core as mx
import mlx.nn as nn

from mlx_rgemma.cpu.layers import QuantizedEmbedding, QuantizedLinear
from mlx_rgemma.errors import UserError
from mlx_rgemma.griffin.fused_projection import FusedInputBlock
from mlx_rgemma.io.memory import available_memory

VARIABLE = "MLX_RGEMMA_DEQUANTIZE"
MODES = ("auto", "off")


def cache_dequantized(model: nn.Module) -> int:
    """Keep float32 weights beside the quantized ones, if they take at most half the free memory.

    Args:
        model: With its projections fused already, if they are to be.

    Returns:
        Bytes taken; 0 where nothing is quantized, there is no room, it would not help, or the
        environment variable `MLX_RGEMMA_DEQUANTIZE` is off.

    Raises:
        UserError: If that variable is neither auto nor off.
    """
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted not in MODES:
        raise UserError(f"{VARIABLE}: found '{wanted}', expected one of {', '.join(MODES)}.")
    if wanted == "off":
        return 0
    modules = [m for m in model.modules() if isinstance(m, (QuantizedLinear, QuantizedEmbedding))]
    needed = sum(4 * module["weight"].size * 32 // module.bits for module in modules)
    if needed > (available_memory() or 0) // 2:
        return 0
    for module in model.modules():
        if isinstance(module, FusedInputBlock):
            _cache_fused(module)
    for module in modules:
        module.cache_dequantized()
    return needed


def _cache_fused(block: FusedInputBlock) -> None:
    """Dequantize a fused projection once; its layers' float32 weights are views into it."""
    fused = block.fused_projection()
    if fused is not None and isinstance(fused.layer, QuantizedLinear):
        weights = mx.split(fused.layer.cache_dequantized(), fused.splits)
        for name, weight in zip(block.shared, weights, strict=True):
            if isinstance(block[name], QuantizedLinear):
                block[name].keep_dequantized(weight)
