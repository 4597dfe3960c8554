"""Two CPU streams for large elementwise work; MLX computes each stream on one thread.

MLX queues at most a hundred operations, so two streams overlap only when their operations
alternate. Splitting an array in half does that.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import mlx.core as mx

from mlx_rgemma.cpu.device import num_threads

MIN_ELEMENTS = 1 << 18
"""Elements from which on half of an array is worth another thread."""


def split_across_streams(
    function: Callable[..., tuple[mx.array, ...]], *arrays: mx.array
) -> tuple[mx.array, ...]:
    """Return ``function(*arrays)`` of a function that treats each row (the last axis) by itself.

    Args:
        function: (N, D) arrays to (N, E) arrays, for any number of rows N and any D and E.
        arrays: (..., D), alike in all axes but the last.

    Returns:
        The function's results, (..., E).
    """
    if max(x.size for x in arrays) < MIN_ELEMENTS or num_threads() < 2:
        return function(*arrays)
    shape = arrays[0].shape[:-1]
    rows = [x.reshape(-1, x.shape[-1]) for x in arrays]
    middle = rows[0].shape[0] // 2
    one = function(*(x[:middle] for x in rows))
    with mx.stream(_side_stream()):
        other = function(*(x[middle:] for x in rows))
    halves = zip(one, other, strict=True)
    return tuple(mx.concatenate([a, b]).reshape(*shape, a.shape[-1]) for a, b in halves)


@cache
def _side_stream() -> Any:
    return mx.new_thread_local_stream(mx.cpu)
