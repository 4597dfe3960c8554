"""Adam's updates in one pass over memory on a Linux CPU.

Adam computes a dozen operations a parameter, each a pass over arrays as large as the model: for
short rows they take a third of a step of training in full.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten

from mlx_rgemma.ops import loops


def in_one_pass(optimizer: optim.Optimizer) -> optim.Optimizer:
    """Have fp32 parameters updated by a loop, as far as Adam or AdamW updates them.

    Those of an update that has a large one among them: for adapters alone, loops are not worth the
    memory of the compiler that comes with them.

    What is computed stays the same, bit for bit. The moments are changed where they lie, and a new
    parameter takes the memory of its gradient, which nobody is to read afterwards. In a model it
    takes the old one's place at once: no more than one parameter is there twice.

    Args:
        optimizer: Any of MLX's. Its `update` raises a ValueError where two parameters have one
            gradient in memory, as those of ``a + b`` do; the model is then half updated. Griffin
            has no such pair.

    Returns:
        The optimizer itself.
    """
    parts = optimizer.optimizers if isinstance(optimizer, optim.MultiOptimizer) else [optimizer]
    under_way = _Update()
    for part in parts:
        if type(part) in (optim.Adam, optim.AdamW):
            _update_by_loop(part, under_way)
    update = optimizer.update

    def update_in_place(model: nn.Module, gradients: Any) -> None:
        arrays: Any = tree_flatten(gradients)
        under_way.largest = max((x.size for _, x in arrays), default=0)
        under_way.places = _places(model)
        del arrays
        try:
            update(model, gradients)
        finally:
            under_way.largest, under_way.places = 0, {}
            under_way.taken.clear()

    optimizer.update = update_in_place  # type: ignore[method-assign]
    return optimizer


@dataclass
class _Update:
    """Of a model: elements of its largest gradient, where each array is, what memory was taken."""

    largest: int = 0
    taken: set[int] = field(default_factory=set)
    places: dict[int, tuple[nn.Module, str]] = field(default_factory=dict)


def _update_by_loop(optimizer: Any, under_way: _Update) -> None:
    update = optimizer.apply_single
    latest: list[mx.array | None] = [None, None]  # the last step, and its numbers

    def numbers() -> mx.array | None:
        """Those of this step: it has an array of its own."""
        if latest[0] is not optimizer.step:
            ready = loops.ready(_numbers(optimizer))
            latest[:] = (None, None) if ready is None else (optimizer.step, ready[0])
        return latest[1]

    def apply_single(gradient: mx.array, parameter: mx.array, state: dict[str, Any]) -> Any:
        arrays = (gradient, parameter, state["m"], state["v"])
        if not loops.many(under_way.largest) or any(x.dtype != mx.float32 for x in arrays):
            return update(gradient, parameter, state)
        given, ready = numbers(), loops.ready(*arrays)
        if given is None or ready is None:
            return update(gradient, parameter, state)
        new, old, m, v = ready
        memory = [np.asarray(x).reshape(-1) for x in (old, m, v, new)]
        if (address := memory[-1].ctypes.data) in under_way.taken:
            raise ValueError(
                "[adam] two parameters share one gradient: use MLX's optimizer as it is."
            )
        under_way.taken.add(address)
        if loops.many(new.size):
            loops.run("adam", new.size, given, *memory)
        else:
            loops.alone("adam", 0, new.size, np.asarray(given), *memory)
        state["m"], state["v"] = m, v
        if (place := under_way.places.get(id(parameter))) is not None:
            module, name = place
            module[name] = new
        return new

    optimizer.apply_single = apply_single


def _places(model: nn.Module) -> dict[int, tuple[nn.Module, str]]:
    """Where each array of a model is, by its identity; not those that are in several places."""
    found: dict[int, Any] = {}
    for module in model.modules():
        for name, value in module.items():
            if isinstance(value, mx.array):
                found[id(value)] = None if id(value) in found else (module, name)
    return {key: place for key, place in found.items() if place is not None}


def _numbers(optimizer: Any) -> mx.array:
    """What the loop `adam` takes beside arrays."""
    (b1, b2), rate, step = optimizer.betas, optimizer.learning_rate, optimizer.step
    root, shrink = mx.array(1.0), mx.array(1.0)
    if isinstance(optimizer, optim.AdamW):
        shrink = 1 - rate * optimizer.weight_decay
    if optimizer.bias_correction:
        rate, root = rate / (1 - b1**step), mx.rsqrt(1 - b2**step)
    numbers = [b1, 1 - b1, b2, 1 - b2, rate, root, optimizer.eps, shrink]
    return mx.stack([mx.array(x, mx.float32) for x in numbers])
