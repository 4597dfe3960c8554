"""Exponential moving average (EMA) of the weights, which usually has a lower loss than the last."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten


class EMA:
    """``average = d average + (1 - d) weights`` with ``d = min(decay, (1 + n) / (10 + n))``.

    `d` is smaller in the first updates, so that the initial weights are soon forgotten.

    Args:
        model: The model whose trainable parameters are averaged, in fp32.
        decay: The largest `d`.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay

        self.weights = {
            name: value.astype(mx.float32) for name, value in _flat(model.trainable_parameters())
        }

    def update(self, model: nn.Module, updates: int) -> None:
        """Update the average with the weights after `updates` updates of the model."""
        decay = min(self.decay, (1.0 + updates) / (10.0 + updates))
        for name, value in _flat(model.trainable_parameters()):
            old = self.weights[name]
            self.weights[name] = old + (1.0 - decay) * (value.astype(mx.float32) - old)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Give the model the averaged weights within a context."""
        own = dict(_flat(model.trainable_parameters()))
        average = [(name, value.astype(own[name].dtype)) for name, value in self.weights.items()]
        model.update(tree_unflatten(average))
        try:
            yield
        finally:
            model.update(tree_unflatten(list(own.items())))


def _flat(parameters: Any) -> list[tuple[str, mx.array]]:
    flat: Any = tree_flatten(parameters)
    return flat
