"""Updates of large parameters on more than the one thread that MLX has for them on a Linux CPU."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

from mlx_rgemma.ops.lanes import lane, worthwhile
from mlx_rgemma.tuner.adam import update_in_pieces


def share_updates(optimizer: optim.Optimizer) -> optim.Optimizer:
    """Have large parameters updated on several cores: Adam's and AdamW's in pieces, by `adam`;
    any other's by turns, each by the thread that has had less to do.

    Args:
        optimizer: Any of MLX's; what it computes stays the same, bit for bit. Gradients that it is
            given may be used up.

    Returns:
        The optimizer itself.
    """
    if isinstance(optimizer, optim.MultiOptimizer):
        for part in optimizer.optimizers:
            share_updates(part)
        return optimizer
    if isinstance(optimizer, optim.Adam) and type(optimizer) in (optim.Adam, optim.AdamW):
        update_in_pieces(optimizer)
        return optimizer
    update = optimizer.apply_single
    done = [0, 0]

    def apply_single(gradient: mx.array, parameter: mx.array, state: dict[str, Any]) -> Any:
        if not worthwhile(parameter.size):
            return update(gradient, parameter, state)
        number = done.index(min(done))
        done[number] += parameter.size
        with lane(number):
            return update(gradient, parameter, state)

    optimizer.apply_single = apply_single  # type: ignore[method-assign]
    return optimizer
