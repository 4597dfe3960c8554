"""The optimizer's rules: what use_weight_decay, and how the learning rate rises and falls."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

from mlx_rgemma.ops import backend

DECAYS = ("cosine", "linear", "constant")


def use_weight_decay(name: str, value: mx.array) -> bool:
    """Whether weight decay applies to a parameter.

    It does to matrices: projections, the embedding and adapters. It does not to the parameters of
    the RG-LRU (Griffin, arXiv:2402.19427, section 3.2: no weight decay on the recurrence), the
    norms, the convolution and all biases.

    Args:
        name: Its full name in the model.
        value: Its value.
    """
    if ".rg_lru." in name or ".conv_1d." in name or "norm" in name:
        return False
    return value.ndim >= 2 and not name.endswith("bias")


def learning_rate_schedule(
    peak: float, steps: int, *, warmup: int = 0, decay: str = "cosine", end: float = 0.0
) -> Callable[[mx.array], mx.array]:
    """The learning rate of each update: up along a line, then down to `end`.

    Args:
        peak: The highest learning rate, reached after `warmup` updates.
        steps: Updates of the whole run.
        warmup: Updates of the rise.
        decay: "cosine", "linear" or "constant".
        end: The learning rate after the last update.

    Raises:
        ValueError: If there is no such decay.
    """
    if decay not in DECAYS:
        raise ValueError(f"[schedule] decay is {decay!r}, expected one of {', '.join(DECAYS)}.")

    def schedule(step: mx.array) -> mx.array:
        step = step.astype(mx.float32)
        rise = mx.minimum((step + 1) / max(warmup, 1), 1.0) if warmup else mx.array(1.0)
        share = mx.clip((step - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        if decay == "cosine":
            fall = 0.5 * (1.0 + mx.cos(math.pi * share))
        elif decay == "linear":
            fall = 1.0 - share
        else:
            fall = mx.array(1.0)
        return rise * (end + (peak - end) * fall)

    return schedule


def adamw(
    learning_rate: Any, *, weight_decay: float, betas: tuple[float, float] = (0.9, 0.99)
) -> optim.Optimizer:
    """AdamW with bias correction, whose weight decay keeps to `use_weight_decay`.

    Args:
        learning_rate: A number, or a function of the update's number.
        weight_decay: Decoupled, times the learning rate.
        betas: Decay rates of the two moments.
    """

    def group(decay: float) -> optim.Optimizer:
        return optim.AdamW(
            learning_rate, betas=list(betas), weight_decay=decay, bias_correction=True
        )

    return backend.optimizer(
        optim.MultiOptimizer([group(weight_decay), group(0.0)], [use_weight_decay])
    )
