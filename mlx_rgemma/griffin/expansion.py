"""Quantized weights in float32 too, for a Linux CPU, which multiplies faster with those.

The quantized arrays stay the model's parameters: what is saved, adapted or fused are they.
"""

from __future__ import annotations

import os
from pathlib import Path

import mlx.nn as nn

from mlx_rgemma.errors import UserError
from mlx_rgemma.griffin.linear import QuantizedEmbedding, QuantizedLinear
from mlx_rgemma.griffin.projection import SharedInputBlock
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
    if needed > _free_memory() // 2:
        return 0
    for module in model.modules():
        if isinstance(module, SharedInputBlock):
            module.expand_joined()
    for module in modules:
        module.expand()
    return needed


def _free_memory() -> int:
    """Bytes that this process may still take, as the kernel tells."""
    free = _numbers(Path("/proc/meminfo")).get("MemAvailable:", 0) * 1024
    group = Path("/sys/fs/cgroup")
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            most, now = (int((group / name).read_text()) for name in (limit, used))
        except (OSError, ValueError):  # no such limit, or "max"
            continue
        free = min(free, most - now)
    return free


def _numbers(file: Path) -> dict[str, int]:
    """Lines of a name, a number and a unit."""
    try:
        lines = [line.split() for line in file.read_text().splitlines()]
    except OSError:
        return {}
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}
