"""Updates of large parameters by turns on two threads of a Linux CPU.

An optimizer computes a dozen elementwise operations a parameter, which MLX runs on one thread: for
short rows they take a third of a step of training in full.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

from mlx_rgemma.ops.lanes import lane, worthwhile


def share_updates(optimizer: optim.Optimizer) -> optim.Optimizer:
    """Have each large parameter updated by the thread that has had less to do.

    Args:
        optimizer: Any of MLX's; what it computes stays the same, bit for bit.

    Returns:
        The optimizer itself.
    """
    if isinstance(optimizer, optim.MultiOptimizer):
        for part in optimizer.optimizers:
            share_updates(part)
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
