"""Independent work side by side on a Linux CPU, where MLX computes each stream on one thread.

The BLAS shares matrix products among all cores; everything else runs on one, and here on two: half
of a large array goes to a stream of its own. MLX begins no operation while a hundred others wait,
so both halves must be alike, operation by operation, for them to run at the same time.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import mlx.core as mx

from mlx_rgemma.ops.processor import cores, on_linux_cpu

LEAST = 1 << 18
"""Elements from which on half of an array is worth the way to another thread."""


def in_halves(
    function: Callable[..., tuple[mx.array, ...]], *arrays: mx.array
) -> tuple[mx.array, ...]:
    """``function(*arrays)`` of a function that treats each row, along the last axis, by itself.

    Args:
        function: (N, D) arrays to (N, E) arrays, for any number of rows N and any D and E.
        arrays: (..., D), alike in all axes but the last.

    Returns:
        What the function gives, (..., E).
    """
    if not worthwhile(max(x.size for x in arrays)):
        return function(*arrays)
    shape = arrays[0].shape[:-1]
    rows = [x.reshape(-1, x.shape[-1]) for x in arrays]
    middle = rows[0].shape[0] // 2
    one = function(*(x[:middle] for x in rows))
    with lane(1):
        other = function(*(x[middle:] for x in rows))
    halves = zip(one, other, strict=True)
    return tuple(mx.concatenate([a, b]).reshape(*shape, a.shape[-1]) for a, b in halves)


def worthwhile(elements: int) -> bool:
    """Whether work on so many elements is to be shared."""
    return elements >= LEAST and on_linux_cpu() and cores() > 1


def lane(number: int) -> AbstractContextManager[Any]:
    """Where operations of this number run: even ones where they would anyhow, odd ones beside."""
    return mx.stream(_beside()) if number % 2 else nullcontext()


@cache
def _beside() -> Any:
    return mx.new_thread_local_stream(mx.cpu)
