"""Take back the last tokens of a cache, for speculative decoding.

A recurrence cannot be run backwards. A cache with rollback enabled records, for each of its last
calls, how to restore the state after the first tokens of that call. A recurrent block keeps its
state before the call and the inputs of its convolution, and recomputes the tokens that stay. A ring
buffer keeps the slots that the call overwrote.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from mlx_rgemma.griffin.checks import KEPT, as_count

Undo = Callable[[Any, int], None]
"""Restores a cache to its state after the given number of tokens of a call."""


class History(NamedTuple):
    """The last calls of a cache, oldest first.

    Attributes:
        limit: Tokens that it can take back at most; longer calls are not recorded.
        calls: The number of tokens of each call, and its undo function.
    """

    limit: int
    calls: tuple[tuple[int, Undo], ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens that can be taken back."""
        return sum(length for length, _ in self.calls)

    def with_call(self, length: int, undo: Undo) -> History:
        """Return the history after a call, without calls beyond the limit."""
        if length > self.limit:
            return History(self.limit)
        calls = (*self.calls, (length, undo))
        spare = sum(n for n, _ in calls) - self.limit
        while spare >= calls[0][0]:
            spare -= calls[0][0]
            calls = calls[1:]
        return History(self.limit, calls)

    def undone(self, cache: Any, tokens: int) -> History:
        """Take `cache` back by `tokens` tokens and return the history after that."""
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
    """Mixin of caches that can take tokens back.

    Attributes:
        positions: Per sequence, the position of its next token in its document.
        history: The recorded calls; None while rollback is disabled.
    """

    positions: list[int]
    history: History | None = None

    def enable_rollback(self, tokens: int) -> None:
        """Let `trim` take back up to `tokens` tokens of later calls.

        Args:
            tokens: The limit; 0 disables rollback and drops the history.
        """
        tokens = as_count(KEPT, tokens)
        self.history = History(tokens) if tokens > 0 else None

    @property
    def trimmable(self) -> int:
        """Tokens that `trim` can take back now."""
        return 0 if self.history is None else self.history.tokens

    def is_trimmable(self) -> bool:
        """Return whether a token can be taken back."""
        return self.trimmable > 0

    def trim(self, n: int) -> int:
        """Take back the last `n` tokens of every sequence, exactly.

        Returns:
            `n`.

        Raises:
            ValueError: If the history holds fewer.
        """
        if as_count("[cache] the number of tokens to take back", n) > self.trimmable:
            raise ValueError(f"[cache] cannot take back {n} tokens: {self.trimmable} are kept.")
        if self.history is not None:
            self.history = self.history.undone(self, n)
            self.positions = [p - n for p in self.positions]
        return n

    def record_call(self, length: int, undo: Undo) -> None:
        """Record the undo function of a call of `length` tokens, if rollback is enabled."""
        if self.history is not None:
            self.history = self.history.with_call(length, undo)

    def clear_history(self) -> None:
        """Drop the recorded calls, because the sequences have changed."""
        if self.history is not None:
            self.history = History(self.history.limit)
