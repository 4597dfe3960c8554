"""Gradient checkpointing: a layer keeps its input and recomputes the rest in the backward pass."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from typing import Any

import mlx.core as mx

from mlx_rgemma.griffin.cache import GriffinCache, RecurrentCache
from mlx_rgemma.griffin.layers import ResidualBlock
from mlx_rgemma.griffin.model import Model
from mlx_rgemma.griffin.sequence_info import SequenceInfo
from mlx_rgemma.ops import backend
from mlx_rgemma.ops.backend import Backend


def checkpoint_layers(model: Model) -> None:
    """Enable gradient checkpointing of each layer.

    A step takes one more forward pass, and holds the activations of one layer and the inputs of
    all. Parameters keep their names; in evaluation mode nothing changes.
    """
    for layer in model.layers:
        layer.__class__ = _Checkpointed


def is_checkpointed(model: Model) -> bool:
    """Return whether the layers of a model are checkpointed."""
    return isinstance(model.layers[0], _Checkpointed)


def lazy_backend() -> AbstractContextManager[None]:
    """Use MLX's operations in place of the CPU backend, and any other backend as it is.

    The CPU backend evaluates its inputs at once, while gradients are traced: all activations would
    be held until the gradients of all layers are evaluated.
    """
    found = backend.active()
    return backend.use(Backend.MLX if found is Backend.CPU else found)


class _Checkpointed(ResidualBlock):
    """A layer under `mx.checkpoint`.

    The layer runs twice and must compute the same: its state is passed in and returned, and dropout
    has a seed.
    """

    def __call__(
        self, x: mx.array, info: SequenceInfo, cache: Any = None, *, last_only: bool = False
    ) -> mx.array:
        if not self.training:
            return super().__call__(x, info, cache, last_only=last_only)
        seed = _draw_seed()
        write_positions: list[int] = []

        def run(parameters: Any, x: mx.array, state: list[mx.array]) -> Any:
            self.update(parameters)
            own = copy.copy(cache)
            set_cache_arrays(own, state)
            mx.random.seed(seed)
            with lazy_backend():
                x = ResidualBlock.__call__(self, x, info, own)
            write_positions.append(getattr(own, "write_pos", 0))
            return [x, *cache_arrays(own)]

        parameters = self.trainable_parameters()
        x, *state = mx.checkpoint(run)(parameters, x, cache_arrays(cache))
        self.update(parameters)
        set_cache_arrays(cache, state)
        if hasattr(cache, "write_pos"):
            cache.write_pos = write_positions[0]
        return x


def cache_arrays(cache: GriffinCache | None) -> list[mx.array]:
    """Return the floating-point arrays of a layer's state."""
    if cache is None:
        return []
    return [cache.h, cache.conv] if isinstance(cache, RecurrentCache) else [cache.kv]


def set_cache_arrays(cache: GriffinCache | None, arrays: list[mx.array]) -> None:
    """Replace the arrays of `cache_arrays`."""
    if isinstance(cache, RecurrentCache):
        cache.h, cache.conv = arrays
    elif cache is not None:
        (cache.kv,) = arrays


def _draw_seed() -> int:
    """Return a seed drawn from MLX's random state, which can be set from an integer only."""
    drawn: Any = mx.random.randint(0, 1 << 30, (2,)).tolist()
    high, low = drawn
    return (high << 30) | low
