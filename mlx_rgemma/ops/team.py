"""Threads beside this one, which take their shares of a loop.

A thread that sleeps is woken in 50 us, as long as many a loop of a decode step takes. So within
`attentive` a helper that has done its share looks out for the next one for a while, before it
sleeps. Elsewhere it sleeps at once: between the loops of a prompt, the BLAS has use for its core.
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

from mlx_rgemma.ops.processor import cores

LOOKS = 1 << 19
"""How often a helper looks before it sleeps: for about 0.2 ms."""
LOOKS_MORE = 1 << 15
"""And once it has seen something: until its giver has begun a share, without Python's lock."""


class _Share:
    """Work for a helper, and how to wait for it."""

    def __init__(
        self, loop: Callable[..., None], arguments: Sequence[Any], let_go: Callable[[], None]
    ) -> None:
        self.loop, self.arguments, self.let_go = loop, arguments, let_go
        self.error: BaseException | None = None
        self.done = Lock()
        self.done.acquire()

    def do(self) -> None:
        try:
            self.loop(*self.arguments)
        except BaseException as error:  # the giver's to deal with
            self.error = error
            self.let_go()
        self.arguments = ()  # whoever is told that it is done may want the only hold on them
        self.done.release()

    def wait(self) -> None:
        self.done.acquire()
        if self.error is not None:
            raise self.error


class _Helper:
    """A thread of its own.

    Attributes:
        given: (1,) int64. Shares given so far, which can be seen without Python's lock.
    """

    def __init__(self, number: int) -> None:
        self.shares: SimpleQueue[_Share] = SimpleQueue()
        self.given = np.zeros(1, np.int64)
        Thread(target=self._work, name=f"mlx_rgemma loops {number}", daemon=True).start()

    def give(self, share: _Share) -> None:
        self.shares.put(share)
        self.given += 1

    def _work(self) -> None:
        while True:
            given = self.given[0]
            if _attention.wanted and self.shares.empty():
                _look_out(self.given, given)
            self.shares.get().do()


class _Attention:
    wanted = 0


_attention = _Attention()


@contextmanager
def attentive() -> Iterator[None]:
    """Have helpers look out for more: loops follow closely upon each other."""
    with _giving:
        _attention.wanted += 1
    try:
        yield
    finally:
        with _giving:
            _attention.wanted -= 1


def share(
    loop: Callable[..., None],
    cuts: Sequence[int],
    arguments: Sequence[Any],
    let_go: Callable[[], None] = lambda: None,
) -> None:
    """Run ``loop(first, last, *arguments)`` between all neighbouring cuts, the first of them here.

    Args:
        loop: Lets go of Python's lock while it runs. It may wait for other shares on the way if
            there are no more of them than `members`.
        cuts: Where shares begin and end: best one share a core.
        arguments: The rest of the loop's.
        let_go: Called when a share fails, or is left out because of an interruption: has others go
            on that wait for it.
    """
    rest = [_Share(loop, (*cut, *arguments), let_go) for cut in pairwise(cuts[1:])]
    try:
        with _giving:  # all helpers take the shares of several givers in the same order
            for helper, part in zip(cycle(_helpers()), rest, strict=False):
                helper.give(part)
        loop(cuts[0], cuts[1], *arguments)
        for part in rest:
            part.wait()
    except BaseException:
        let_go()
        raise


def members() -> int:
    """Threads that work on shares at the same time: the one that gives them, and the helpers."""
    return len(_helpers()) + 1


@cache
def _helpers() -> list[_Helper]:
    return [_Helper(number) for number in range(1, max(cores(), 2))]


_giving = Lock()
"""Of whoever gives shares, or says that more are to come."""
os.register_at_fork(before=_giving.acquire, after_in_parent=_giving.release)
os.register_at_fork(after_in_child=_giving.release)
os.register_at_fork(after_in_child=_helpers.cache_clear)  # threads do not survive a fork


def _look_out(given: np.ndarray[Any, Any], before: int) -> None:
    from mlx_rgemma.ops.compiled.threads import look_out

    look_out(given, before, LOOKS, LOOKS_MORE)
