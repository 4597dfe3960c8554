"""What a cache keeps so that its last tokens can be taken back: only where it is asked for.

A recurrence cannot be run backwards. A cache that keeps a history remembers, for each of its last
calls, how to become again what it was after the first tokens of that call: a recurrent block holds
its state before the call and the inputs of its convolution, and reads the tokens that stay once
more; a ring holds the slots that the call wrote over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from mlx_rgemma.griffin.checks import KEPT, as_count

Undo = Callable[[Any, int], None]
"""Makes a cache what it was after so many tokens of the call that is undone."""


class History(NamedTuple):
    """The last calls of a cache, oldest first.

    Attributes:
        limit: How many tokens back it has to reach; calls of more tokens are not remembered.
        calls: The number of tokens of each call, and what undoes it.
    """

    limit: int
    calls: tuple[tuple[int, Undo], ...] = ()

    @property
    def tokens(self) -> int:
        """How many tokens can be taken back."""
        return sum(length for length, _ in self.calls)

    def with_call(self, length: int, undo: Undo) -> History:
        """The history after a call, without what it no longer has to reach."""
        if length > self.limit:
            return History(self.limit)
        calls = (*self.calls, (length, undo))
        spare = sum(n for n, _ in calls) - self.limit
        while spare >= calls[0][0]:
            spare -= calls[0][0]
            calls = calls[1:]
        return History(self.limit, calls)

    def undone(self, cache: Any, tokens: int) -> History:
        """The history after `cache` has been taken back by so many tokens."""
        calls = list(self.calls)
        while tokens:
            length, undo = calls.pop()
            kept = max(0, length - tokens)
            undo(cache, kept)
            tokens -= length - kept
            if kept:
                calls.append((kept, undo))
        return History(self.limit, tuple(calls))


class Rollback:
    """The part of a cache that takes tokens back.

    Attributes:
        positions: For each row, the position of its next token in its document.
        history: How to take back the last tokens; None unless `enable_rollback` asked for it.
    """

    positions: list[int]
    history: History | None = None

    def enable_rollback(self, tokens: int) -> None:
        """Make the last `tokens` tokens of calls to come ones that `trim` can take back.

        Args:
            tokens: How many; 0 to stop, and to drop what is kept.
        """
        tokens = as_count(KEPT, tokens)
        self.history = History(tokens) if tokens > 0 else None

    @property
    def trimmable(self) -> int:
        """How many tokens `trim` can take back now."""
        return 0 if self.history is None else self.history.tokens

    def is_trimmable(self) -> bool:
        """Whether a token can be taken back; False unless a history is kept."""
        return self.trimmable > 0

    def trim(self, n: int) -> int:
        """Take back the last `n` tokens of every row, exactly.

        Returns:
            `n`.

        Raises:
            ValueError: If the history does not reach back that far.
        """
        if as_count("[cache] the number of tokens to take back", n) > self.trimmable:
            raise ValueError(f"[cache] cannot take back {n} tokens: {self.trimmable} are kept.")
        if self.history is not None:
            self.history = self.history.undone(self, n)
            self.positions = [p - n for p in self.positions]
        return n

    def record_call(self, length: int, undo: Undo) -> None:
        """Note what undoes a call of `length` tokens, where a history is kept."""
        if self.history is not None:
            self.history = self.history.with_call(length, undo)

    def clear_history(self) -> None:
        """Drop the calls remembered: the rows have changed."""
        if self.history is not None:
            self.history = History(self.history.limit)
