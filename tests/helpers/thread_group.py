"""A group of threads in place of processes: what they hand around is noted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import mlx.core as mx


class ThreadGroup:
    """What a thread sees of its group, in the manner of `mx.distributed.Group`."""

    def __init__(self, rank: int, size: int, exchange: Exchange) -> None:
        self._rank, self._size, self.exchange = rank, size, exchange

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


class Exchange:
    """Where the threads meet.

    Attributes:
        sums, gathers: Of the first thread, the bytes of each array that it handed in.
    """

    def __init__(self, size: int) -> None:
        self.slots: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=60)
        self.sums: list[int] = []
        self.gathers: list[int] = []

    def collect(self, x: mx.array, rank: int, sent: list[int]) -> list[mx.array]:
        mx.eval(x)
        self.slots[rank] = x
        self.barrier.wait()
        found = list(self.slots)
        self.barrier.wait()
        if rank == 0:
            sent.append(x.nbytes)
        return found


def run_threads(size: int, work: Callable[[ThreadGroup], Any]) -> list[Any]:
    """What `work` returns in each thread of a group; arrays must be evaluated by it."""
    exchange = Exchange(size)
    groups = [ThreadGroup(rank, size, exchange) for rank in range(size)]
    results: list[Any] = [None] * size
    problems: list[BaseException] = []

    def run(group: ThreadGroup) -> None:
        try:
            results[group.rank()] = work(group)
        except BaseException as error:
            problems.append(error)
            exchange.barrier.abort()

    with _collectives():
        threads = [threading.Thread(target=run, args=(group,)) for group in groups]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if problems:
        raise next(p for p in problems if not isinstance(p, threading.BrokenBarrierError))
    return results


@contextmanager
def _collectives() -> Iterator[None]:
    def all_sum(x: Any, *, group: ThreadGroup, stream: Any = None) -> mx.array:
        first, *others = group.exchange.collect(mx.array(x), group.rank(), group.exchange.sums)
        for other in others:
            first = first + other
        return first

    def all_gather(x: mx.array, *, group: ThreadGroup, stream: Any = None) -> mx.array:
        return mx.concatenate(group.exchange.collect(x, group.rank(), group.exchange.gathers))

    with (
        mock.patch.object(mx.distributed, "all_sum", all_sum),
        mock.patch.object(mx.distributed, "all_gather", all_gather),
    ):
        yield
