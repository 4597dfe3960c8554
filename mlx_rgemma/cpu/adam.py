"""Adam's updates in one pass over memory, by a Numba kernel.

MLX's Adam computes a dozen operations per parameter, each a pass over arrays as large as the model:
for short sequences they take a third of a step of full training.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten

from mlx_rgemma.cpu import numba_runtime
from mlx_rgemma.cpu.arrays import materialize


def fuse_adam(optimizer: optim.Optimizer) -> optim.Optimizer:
    """Update fp32 parameters of Adam and AdamW by a Numba kernel.

    Applied only if the update contains a large parameter; for LoRA alone, loading Numba costs more
    memory than it saves time.

    The results are the same, bit for bit. The moments are changed where they lie, and a new
    parameter takes the memory of its gradient, which must not be read afterwards. In a model it
    takes the old one's place at once: no more than one parameter is there twice.

    Args:
        optimizer: Any of MLX's. Its `update` raises a ValueError where two parameters have one
            gradient in memory, as those of ``a + b`` do; the model is then half updated. Griffin
            has no such pair.

    Returns:
        The optimizer itself.
    """
    parts = optimizer.optimizers if isinstance(optimizer, optim.MultiOptimizer) else [optimizer]
    update_state = _UpdateState()
    for part in parts:
        if type(part) in (optim.Adam, optim.AdamW):
            _use_kernel(part, update_state)
    update = optimizer.update

    def update_in_place(model: nn.Module, gradients: Any) -> None:
        arrays: Any = tree_flatten(gradients)
        update_state.largest = max((x.size for _, x in arrays), default=0)
        update_state.places = _places(model)
        del arrays
        try:
            update(model, gradients)
        finally:
            update_state.largest, update_state.places = 0, {}
            update_state.taken.clear()

    optimizer.update = update_in_place  # type: ignore[method-assign]
    return optimizer


@dataclass
class _UpdateState:
    """Elements of a model's largest gradient, where each array is, addresses that were taken."""

    largest: int = 0
    taken: set[int] = field(default_factory=set)
    places: dict[int, tuple[nn.Module, str]] = field(default_factory=dict)


def _use_kernel(optimizer: Any, update_state: _UpdateState) -> None:
    update = optimizer.apply_single
    latest: list[Any] = [None, None]  # the last step, and its coefficients

    def coefficients() -> Any:
        """Those of this step, which has an array of its own."""
        if latest[0] is not optimizer.step:
            views = materialize(_coefficients(optimizer))
            latest[:] = (None, None) if views is None else (optimizer.step, views[0])
        return latest[1]

    def apply_single(gradient: mx.array, parameter: mx.array, state: dict[str, Any]) -> Any:
        arrays = (gradient, parameter, state["m"], state["v"])
        if not numba_runtime.is_large(update_state.largest) or any(
            x.dtype != mx.float32 for x in arrays
        ):
            return update(gradient, parameter, state)
        given = coefficients()
        if given is None or not _evaluated(arrays):
            return update(gradient, parameter, state)
        new, old, m, v = (mx.contiguous(x) for x in arrays)
        mx.eval(new, old, m, v)
        memory = [np.asarray(x).reshape(-1) for x in (old, m, v, new)]
        if (address := memory[-1].ctypes.data) in update_state.taken:
            raise ValueError(
                "[adam] two parameters share one gradient: use MLX's optimizer as it is."
            )
        update_state.taken.add(address)
        if numba_runtime.is_large(new.size):
            numba_runtime.run("adam", new.size, given, *memory)
        else:
            numba_runtime.run_serial("adam", 0, new.size, given, *memory)
        state["m"], state["v"] = m, v
        if (place := update_state.places.get(id(parameter))) is not None:
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


def _coefficients(optimizer: Any) -> mx.array:
    """Return the values that the kernel `adam` takes beside arrays."""
    (b1, b2), rate, step = optimizer.betas, optimizer.learning_rate, optimizer.step
    root, shrink = mx.array(1.0), mx.array(1.0)
    if isinstance(optimizer, optim.AdamW):
        shrink = 1 - rate * optimizer.weight_decay
    if optimizer.bias_correction:
        rate, root = rate / (1 - b1**step), mx.rsqrt(1 - b2**step)
    numbers = [b1, 1 - b1, b2, 1 - b2, rate, root, optimizer.eps, shrink]
    return mx.stack([mx.array(x, mx.float32) for x in numbers])


def _evaluated(arrays: Any) -> bool:
    """Evaluate arrays; False while a function is traced."""
    try:
        mx.eval(*arrays)
    except ValueError:
        return False
    return True
