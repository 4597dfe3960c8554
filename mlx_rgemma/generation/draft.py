"""Drafters for speculative decoding: a smaller model, or lookup in the text so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import mlx.core as mx

from mlx_rgemma.generation.sampling import Sampler
from mlx_rgemma.griffin.cache import GriffinCache
from mlx_rgemma.griffin.model import Model
from mlx_rgemma.ops.sums import log_softmax

Process = Callable[[mx.array, mx.array], mx.array]
"""Applies the logits processors to (1, V) logits after the tokens drafted so far."""

LOOKUP_WINDOW = 8192
"""Most recent tokens that `PromptLookup` searches."""
LOOKUP_SIZES = (4, 3, 2)
"""Lengths of the n-grams to match, the longest first."""


class Draft(NamedTuple):
    """Proposed next tokens.

    Attributes:
        tokens: (n,), int32.
        logprobs: (n, V), fp32. The distribution of each; None if they were not sampled.
    """

    tokens: mx.array
    logprobs: mx.array | None = None


EMPTY_DRAFT = Draft(mx.array([], mx.int32))


class Drafter(Protocol):
    """Interface of drafters."""

    def read(self, tokens: mx.array) -> None:
        """Read a part of the prompt."""

    def draft(self, last: int, n: int, process: Process) -> Draft:
        """Propose up to `n` tokens after `last`, which has not been read yet."""

    def accept(self, kept: int) -> None:
        """Accept the first `kept` proposed tokens as part of the text."""

    def finish(self, last: int | None) -> None:
        """End the generation; `last` is a token that has not been read yet, if any."""


class DraftModel:
    """Drafter that runs a smaller model with the same vocabulary.

    Args:
        model: The smaller model.
        cache: Its state, of the same text; updated in place.
        sampler: The sampler of the text.
        limit: Tokens per draft at most.
    """

    def __init__(self, model: Model, cache: list[GriffinCache], sampler: Any, limit: int) -> None:
        self.model = model
        self.cache = cache
        self.sampler = sampler
        self.pending: list[int] = []  # accepted tokens that the model has not read
        self.drafted: mx.array = EMPTY_DRAFT.tokens
        for layer in cache:
            layer.enable_rollback(limit + 1)

    def read(self, tokens: mx.array) -> None:
        self.model.prefill(tokens[None], self.cache)
        mx.eval([layer.state for layer in self.cache])

    def draft(self, last: int, n: int, process: Process) -> Draft:
        self.pending.append(last)
        self.drafted = EMPTY_DRAFT.tokens
        if n == 0:
            return EMPTY_DRAFT
        with_probs = isinstance(self.sampler, Sampler) and not self.sampler.greedy
        unread = mx.array(self.pending, mx.int32)
        distributions = []
        for _ in range(n):
            logits = self.model(unread[None], cache=self.cache)[:, -1]
            logprobs = log_softmax(process(logits, self.drafted))
            if with_probs:
                distributions.append(self.sampler.distribution(logprobs))
                token = mx.random.categorical(distributions[-1])
            else:
                token = self.sampler(logprobs)
            unread = token.astype(mx.int32)
            self.drafted = mx.concatenate([self.drafted, unread])
        self.pending = []
        return Draft(self.drafted, mx.concatenate(distributions) if distributions else None)

    def accept(self, kept: int) -> None:
        spare = self.drafted.size - 1 - kept  # the last token drafted has not been read
        if spare > 0:
            for layer in self.cache:
                layer.trim(spare)
        elif spare < 0 and kept:
            token: Any = self.drafted[kept - 1].item()
            self.pending.append(token)

    def finish(self, last: int | None) -> None:
        unread = self.pending if last is None else [*self.pending, last]
        if unread:
            self.read(mx.array(unread, mx.int32))
        self.pending = []
        for layer in self.cache:
            layer.enable_rollback(0)
        mx.eval([layer.state for layer in self.cache])


class PromptLookup:
    """Drafter that finds an earlier occurrence of the last tokens and copies its continuation.

    Keeps a bounded number of the last tokens, and an index of their n-grams.

    Args:
        window: Tokens to keep.
        sizes: Lengths of the n-grams to match, the longest first.
    """

    def __init__(self, window: int = LOOKUP_WINDOW, sizes: Sequence[int] = LOOKUP_SIZES) -> None:
        self.window = window
        self.sizes = tuple(sizes)
        self.tokens: list[int] = []
        self.start = 0  # position of the first token kept
        self.index: dict[tuple[int, ...], int] = {}  # position after the last occurrence
        self.drafted: list[int] = []

    def read(self, tokens: mx.array) -> None:
        values: Any = tokens.tolist()
        for token in values[-self.window :]:
            self._add(token)

    def draft(self, last: int, n: int, process: Process) -> Draft:
        self._add(last)
        self.drafted = self._continuation(n)
        return Draft(mx.array(self.drafted, mx.int32))

    def accept(self, kept: int) -> None:
        for token in self.drafted[:kept]:
            self._add(token)

    def finish(self, last: int | None) -> None:
        self.drafted = []

    def _add(self, token: int) -> None:
        for size in self.sizes:
            if len(self.tokens) >= size:
                self.index[tuple(self.tokens[-size:])] = self.start + len(self.tokens)
        self.tokens.append(token)
        if len(self.tokens) > 2 * self.window:
            self.start += self.window
            del self.tokens[: self.window]
            longest = self.start + max(self.sizes)
            self.index = {key: at for key, at in self.index.items() if at >= longest}

    def _continuation(self, n: int) -> list[int]:
        """Return the continuation of an earlier occurrence, repeated up to `n` tokens."""
        for size in self.sizes:
            at = self.index.get(tuple(self.tokens[-size:]))
            if at is not None and len(self.tokens) >= size:
                text = self.tokens[at - self.start :]
                return [text[i % len(text)] for i in range(n)]
        return []
