"""Several cores of a Linux CPU, on which MLX runs one thread a stream.

A lane is a stream, and so a core. A chunk of a prompt is cut in time, a piece a lane, and the
pieces are computed side by side, layer by layer: what a piece needs of the one before is the state
that the layer leaves behind, which is there long before the rest of the layer is. To a layer they
are several calls. Each lane multiplies with one thread of the BLAS, whose own threads would share
the products alone.

A decode step has too little between two points where its parts meet.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import mlx.core as mx

from mlx_rgemma.errors import UserError
from mlx_rgemma.ops import on_linux_cpu

VARIABLE = "MLX_RGEMMA_LANES"
LEAST_TOKENS = 64
"""Tokens of a lane, all rows together, below which a lane more saves nothing."""
MOST_LANES = 4
"""MLX looks some sixty operations ahead, those of all streams together."""


def most() -> int:
    """How many lanes there are at most: 1 anywhere but on a Linux CPU.

    The environment variable ``MLX_RGEMMA_LANES`` sets it; by default as many as there are cores,
    up to `MOST_LANES`.

    Raises:
        UserError: If the variable is set to something else than a number above 0.
    """
    return _most(os.environ.get(VARIABLE)) if on_linux_cpu() else 1


@lru_cache(maxsize=8)
def _most(wanted: str | None) -> int:
    if wanted is None:
        return min(len(os.sched_getaffinity(0)), MOST_LANES)
    if not wanted.isdecimal() or int(wanted) < 1:
        raise UserError(f"{VARIABLE} is {wanted!r}, expected a number of lanes, 1 or more.")
    return int(wanted)


def for_tokens(tokens: mx.array) -> int:
    """How many lanes read tokens (B, L): 1 where they are but traced, by a transformation."""
    lanes = min(most(), tokens.shape[1], tokens.size // LEAST_TOKENS)
    return lanes if lanes > 1 and start([tokens]) else 1


def cut(length: int, lanes: int) -> Iterator[tuple[int, int]]:
    """Begin and end of each lane's piece, as even as can be."""
    for i in range(lanes):
        yield i * length // lanes, (i + 1) * length // lanes


def stream(lane: int) -> AbstractContextManager[object]:
    """In it, operations belong to a lane; the first lane's are those of the current stream."""
    if lane == 0:
        return nullcontext()
    while len(_streams) < lane:
        _streams.append(mx.new_thread_local_stream(mx.cpu))
    return mx.stream(_streams[lane - 1])


_streams: list[mx.ThreadLocalStream] = []


def start(arrays: Sequence[mx.array]) -> bool:
    """Have arrays computed while more of the graph is made; False if they are but traced."""
    try:
        mx.async_eval(arrays)
    except ValueError:
        return False
    return True


def finish(x: mx.array) -> None:
    """Wait for what `start` has begun, unless it is but traced."""
    if start([x]):
        mx.eval(x)
