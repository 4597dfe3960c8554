"""Updates of Adam and AdamW piece by piece, on all cores of a Linux CPU.

MLX computes an update in a dozen operations, each of which reads and writes whole arrays: a third
of a step of training in full where rows are short. Here NumPy computes the same operations in the
same order, and so to the same bits, on pieces that stay in a core's cache.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map

from mlx_rgemma.ops import lanes, on_linux_cpu

PIECE = 1 << 16
"""Elements of a piece: four arrays of as many, and two of what is computed on the way, 1.5 MB."""


def update_in_pieces(optimizer: optim.Adam) -> None:
    """Have an optimizer update large float32 parameters in this way.

    Moments are updated in place, and a new parameter takes the memory of its gradient: what is
    passed as gradients is used up. Gradients are computed as they are needed, those of the last
    layers first, so that only few exist at a time. Not for use within `mx.compile`.

    Args:
        optimizer: An `Adam` or `AdamW` of MLX, of no other class.
    """
    plain = optimizer.apply_gradients

    def apply_gradients(gradients: Any, parameters: Any) -> Any:
        found: list[tuple[mx.array, mx.array, dict[str, mx.array]]] = []
        optimizer.init(gradients)  # where there are no moments yet
        tree_map(lambda *arrays: found.append(arrays), gradients, parameters, optimizer.state)
        if not any(_is_large(gradient) for gradient, _, _ in found):
            return plain(gradients, parameters)
        plain({}, {})  # counts the update, and sets what is scheduled
        rule = _Rule(optimizer)
        updated: list[mx.array] = []
        waiting: list[mx.array] = []
        kept = {_place(parameter) for _, parameter, _ in found if _is_large(parameter)}
        written: set[int | None] = set()
        for gradient, parameter, state in reversed(found):
            waiting.append(gradient)
            pieces = None
            if _is_large(gradient):
                mx.eval(waiting, state)
                waiting = []
                place = _place(gradient)
                if place in written:
                    raise ValueError("[adam] two parameters have one gradient array; pass copies.")
                if place not in kept:  # a gradient may be a parameter
                    pieces = _views(gradient, parameter, state["m"], state["v"])
            if pieces is None:
                updated.append(optimizer.apply_single(gradient, parameter, state))
            else:
                rule.apply(*pieces)
                written.add(place)
                updated.append(gradient)
        return tree_map(lambda _: updated.pop(), gradients)

    optimizer.apply_gradients = apply_gradients  # type: ignore[method-assign]


class _Rule:
    """What MLX's `apply_single` of one update computes, with its numbers."""

    def __init__(self, optimizer: optim.Adam) -> None:
        rate = optimizer.learning_rate.astype(mx.float32)
        (b1, b2), step = optimizer.betas, optimizer.step
        kept = 1 - rate * getattr(optimizer, "weight_decay", 0.0)
        self.correction = np.float32(1.0)
        if optimizer.bias_correction:
            rate = (rate / (1 - b1**step)).astype(mx.float32)
            self.correction = _number(mx.rsqrt(1 - b2**step))
        self.rate, self.kept = _number(rate), _number(kept)
        self.b1, self.b2 = np.float32(b1), np.float32(b2)
        self.of_gradient, self.of_square = np.float32(1 - b1), np.float32(1 - b2)
        self.eps = np.float32(optimizer.eps)

    def apply(self, *arrays: np.ndarray) -> None:
        """Update a parameter: gradient, parameter and moments, flat; it replaces the gradient."""
        size = arrays[0].size
        pieces = [[z[i : i + PIECE] for z in arrays] for i in range(0, size, PIECE)]
        threads = min(lanes.cores(), len(pieces))
        others = [_pool().submit(self._work, pieces[i::threads]) for i in range(1, threads)]
        self._work(pieces[::threads])
        for other in others:
            other.result()

    def _work(self, pieces: list[list[np.ndarray]]) -> None:
        scratch = np.empty((2, PIECE), np.float32)
        with np.errstate(all="ignore"):  # as MLX does: infinities are the caller's to notice
            for gradient, parameter, m, v in pieces:
                self._update(gradient, parameter, m, v, *scratch[:, : gradient.size])

    def _update(self, gradient: Any, parameter: Any, m: Any, v: Any, a: Any, b: Any) -> None:
        m *= self.b1
        m += np.multiply(gradient, self.of_gradient, out=a)
        v *= self.b2
        np.square(gradient, out=a)
        a *= self.of_square
        v += a
        np.sqrt(v, out=a)
        a *= self.correction
        a += self.eps
        np.multiply(m, self.rate, out=b)
        b /= a
        np.multiply(parameter, self.kept, out=gradient)
        gradient -= b


def _is_large(array: mx.array) -> bool:
    return array.size >= lanes.LEAST and on_linux_cpu()


def _views(*arrays: mx.array) -> list[np.ndarray] | None:
    """The memory of some arrays, flat; None unless all are float32 and lie in one piece each."""
    if any(z.dtype != mx.float32 for z in arrays):
        return None
    views = [np.array(z, copy=False) for z in arrays]
    if not all(z.flags.c_contiguous and z.flags.writeable for z in views):
        return None
    return [z.reshape(-1) for z in views]


def _place(array: mx.array) -> int | None:
    """Where a float32 array begins in memory; None for others."""
    if array.dtype != mx.float32:
        return None
    place: int = np.array(array, copy=False).ctypes.data
    return place


def _number(value: mx.array) -> np.float32:
    number: Any = value.astype(mx.float32).item()
    return np.float32(number)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(lanes.cores(), "adam")
