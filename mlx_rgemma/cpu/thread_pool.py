"""A thread pool that runs slices of a Numba kernel.

Waking a sleeping thread takes 50 us, as long as many kernels of a decode step run. Within
`spin_between_tasks` a worker that has finished spins for a while before it sleeps. Elsewhere it
sleeps at once: between the kernels of a prompt, the BLAS has use for its core.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import cycle, pairwise
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any

import numpy as np

from mlx_rgemma.cpu.device import num_threads

SPIN_LIMIT = 1 << 19
"""Spins of a worker before it sleeps: about 0.2 ms."""
MORE_SPINS = 1 << 15
"""Spins after it has seen a task: until the caller has begun its own slice, without the GIL."""


class _Task:
    """A slice of a kernel's work for a worker."""

    def __init__(
        self, kernel: Callable[..., None], arguments: Sequence[Any], abort: Callable[[], None]
    ) -> None:
        self.kernel, self.arguments, self.abort = kernel, arguments, abort
        self.error: BaseException | None = None
        self.done = Lock()
        self.done.acquire()

    def run(self) -> None:
        try:
            self.kernel(*self.arguments)
        except BaseException as error:  # raised in the caller by `wait`
            self.error = error
            self.abort()
        self.arguments = ()  # the caller may need to hold the only reference
        self.done.release()

    def wait(self) -> None:
        self.done.acquire()
        if self.error is not None:
            raise self.error


class _Worker:
    """A daemon thread with a queue of tasks.

    Attributes:
        submitted: (1,) int64. Tasks so far; spun on without the GIL.
    """

    def __init__(self, number: int) -> None:
        self.tasks: SimpleQueue[_Task] = SimpleQueue()
        self.submitted = np.zeros(1, np.int64)
        Thread(target=self._work, name=f"mlx_rgemma worker {number}", daemon=True).start()

    def submit(self, task: _Task) -> None:
        self.tasks.put(task)
        self.submitted += 1

    def _work(self) -> None:
        while True:
            submitted = self.submitted[0]
            if _spinning.wanted and self.tasks.empty():
                _spin_wait(self.submitted, submitted)
            self.tasks.get().run()


class _Spinning:
    wanted = 0


_spinning = _Spinning()


@contextmanager
def spin_between_tasks() -> Iterator[None]:
    """Let workers spin between tasks: kernels follow closely upon each other."""
    with _submitting:
        _spinning.wanted += 1
    try:
        yield
    finally:
        with _submitting:
            _spinning.wanted -= 1


def parallel_for(
    kernel: Callable[..., None],
    splits: Sequence[int],
    arguments: Sequence[Any],
    abort: Callable[[], None] = lambda: None,
) -> None:
    """Run ``kernel(first, last, *arguments)`` on each slice of work, the first one on this thread.

    Args:
        kernel: Releases the GIL while it runs. It may wait for other slices at a barrier if there
            are no more of them than `num_workers` + 1.
        splits: Bounds of the slices, best one slice per thread.
        arguments: The kernel's other arguments.
        abort: Called when a slice fails or is left out because of an interruption: releases the
            slices that wait for it at a barrier.
    """
    rest = [_Task(kernel, (*bounds, *arguments), abort) for bounds in pairwise(splits[1:])]
    try:
        with _submitting:  # all workers run the tasks of several callers in the same order
            for worker, part in zip(cycle(_workers()), rest, strict=False):
                worker.submit(part)
        kernel(splits[0], splits[1], *arguments)
        for part in rest:
            part.wait()
    except BaseException:
        abort()
        raise


def num_workers() -> int:
    """Return the number of worker threads."""
    return len(_workers())


@cache
def _workers() -> list[_Worker]:
    return [_Worker(number) for number in range(1, max(num_threads(), 2))]


_submitting = Lock()
"""Held while tasks are submitted, or spinning is switched."""
os.register_at_fork(before=_submitting.acquire, after_in_parent=_submitting.release)
os.register_at_fork(after_in_child=_submitting.release)
os.register_at_fork(after_in_child=_workers.cache_clear)  # threads do not survive a fork


def _spin_wait(submitted: np.ndarray[Any, Any], before: int) -> None:
    from mlx_rgemma.cpu.kernels.threads import spin_wait

    spin_wait(submitted, before, SPIN_LIMIT, MORE_SPINS)
