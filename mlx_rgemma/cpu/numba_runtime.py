"""Runs Numba kernels over the memory of MLX's arrays.

MLX's CPU backend computes each elementwise operation by itself and on one thread: GELU is thirty
operations that pass through memory thirty times. A Numba kernel (`kernels`) passes through it once,
on all threads. Its inputs must be evaluated first, so kernels are used for inference only: in
training, evaluating early would keep every activation alive.

Within `mx.compile` and `mx.vmap`, where arrays have no values, the reference runs.
"""

from __future__ import annotations

import logging
import time
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rgemma.cpu.device import num_threads
from mlx_rgemma.cpu.thread_pool import num_workers, parallel_for

MIN_ELEMENTS = 1 << 16
"""Elements from which on a kernel is worth evaluating its inputs."""
MIN_TOKENS = 16
"""Tokens from which on a call is a prompt rather than steps of a decode loop."""


def is_long(x: mx.array, *_arrays: Any, **_options: Any) -> bool:
    """Return whether Numba kernels should run over activations like these, (..., L, channels)."""
    return x.ndim > 1 and x.shape[-2] >= MIN_TOKENS and is_large(x.size)


def is_large(elements: int) -> bool:
    """Return whether a Numba kernel pays for this number of elements."""
    return elements >= MIN_ELEMENTS and available()


@cache
def available() -> bool:
    """Return whether Numba is installed."""
    return find_spec("numba") is not None


def run(name: str, items: int, *arguments: Any) -> None:
    """Run a kernel over all its work items, a slice per thread.

    Args:
        name: The kernel's.
        items: Work items.
        arguments: NumPy's arrays, and numbers.
    """
    slices = max(min(num_threads(), items), 1)
    splits = [items * i // slices for i in range(slices + 1)]
    parallel_for(getattr(_kernels(), name), splits, arguments)


def run_serial(name: str, *arguments: Any) -> None:
    """Run a kernel on this thread, with these arguments and no others."""
    getattr(_kernels(), name)(*arguments)


def run_region(name: str, threads: int, *arguments: Any) -> None:
    """Run a kernel on several threads at the same time, which synchronize at its barriers.

    Args:
        name: The kernel's.
        threads: `max_region_threads` at most.
        arguments: NumPy's arrays, numbers, and tuples of both, after the number of threads and the
            barrier's counter.
    """
    barrier = np.zeros(1, np.int64)

    def abort() -> None:
        barrier[0] = 1 << 62

    parallel_for(
        getattr(_kernels(), name), range(threads + 1), (threads, barrier, *arguments), abort
    )


def max_region_threads() -> int:
    """Return the number of threads that can run at the same time."""
    return min(num_threads(), num_workers() + 1)


def constant(name: str) -> int:
    """Return an integer of `kernels` that depends on the processor."""
    found: int = getattr(_kernels(), name)
    return found


@cache
def _kernels() -> Any:
    found = import_module("mlx_rgemma.cpu.kernels")  # takes half a second: only when needed
    _watch_compiler()
    return found


log = logging.getLogger(__name__)

COMPILING = "Compiling kernels for this CPU, once: about 20 s"
_compiled: list[tuple[float, float]] = []
"""When each compilation of this process began and ended."""


def compile_seconds(since: float) -> float:
    """Return the seconds of compilation since a moment of `time.perf_counter`.

    Speeds leave them out: a kernel is compiled on its first run on a machine, and cached on disk.
    """
    return sum(max(end - max(begin, since), 0.0) for begin, end in _compiled)


def _watch_compiler() -> None:
    """Record when kernels are compiled; log one line before the first."""
    from numba.core import event

    class Listener(event.Listener):
        """Numba compiles one function at a time, and within it those that it calls."""

        depth, begin = 0, 0.0

        def on_start(self, event: Any) -> None:
            if self._ours(event):
                if self.depth == 0:
                    if not _compiled:
                        log.info(COMPILING)
                    self.begin = time.perf_counter()
                self.depth += 1

        def on_end(self, event: Any) -> None:
            if self._ours(event):
                self.depth -= 1
                if self.depth == 0:
                    _compiled.append((self.begin, time.perf_counter()))

        def _ours(self, event: Any) -> bool:
            module: str = event.data["dispatcher"].py_func.__module__
            return module.startswith("mlx_rgemma.")

    event.register("numba:compile", Listener())
