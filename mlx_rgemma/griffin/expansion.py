"""Quantized weights in float32 too, for a Linux CPU, which multiplies faster with those.

The quantized arrays stay the model's parameters: what is saved, adapted or fused are they.
"""

from __future__ import annotations

import os

import mlx.nn as nn

from mlx_rgemma.errors import UserError
from mlx_rgemma.griffin.linear import QuantizedEmbedding, QuantizedLinear
from mlx_rgemma.griffin.projection import SharedInputBlock
from mlx_rgemma.io.memory import available_memory
from mlx_rgemma.ops import on_linux_cpu

VARIABLE = "MLX_RGEMMA_EXPAND"
MODES = ("auto", "off")


def expand_quantized(model: nn.Module) -> int:
    """Lay float32 weights beside the quantized ones, if they take at most half the free memory.

    Args:
        model: Whose projections are joined already, if they are to be.

    Returns:
        Bytes taken; 0 where nothing is quantized, there is no room, it would not help, or the
        environment variable `MLX_RGEMMA_EXPAND` is off.

    Raises:
        UserError: If that variable is neither auto nor off.
    """
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted not in MODES:
        raise UserError(f"{VARIABLE}: found '{wanted}', expected one of {', '.join(MODES)}.")
    if wanted == "off" or not on_linux_cpu():
        return 0
    modules = [m for m in model.modules() if isinstance(m, (QuantizedLinear, QuantizedEmbedding))]
    needed = sum(4 * module["weight"].size * 32 // module.bits for module in modules)
    if needed > (available_memory() or 0) // 2:
        return 0
    for module in model.modules():
        if isinstance(module, SharedInputBlock):
            module.expand_joined()
    for module in modules:
        module.expand()
    return needed
