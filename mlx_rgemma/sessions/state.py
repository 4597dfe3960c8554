"""The state of one text while it is read and written: exact whenever a token is handed out."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import mlx.core as mx

from mlx_rgemma.errors import UserError
from mlx_rgemma.generation.decode import Processors, Sampler, greedy
from mlx_rgemma.griffin.cache import AttentionCache, GriffinCache
from mlx_rgemma.griffin.model import Model
from mlx_rgemma.griffin.process import refuse_forked_process
from mlx_rgemma.ops.sums import log_softmax


class TextState:
    """Caches that have read every token but the last, and that last token.

    Arrays are never written to, only replaced, and caches are replaced as a whole: an exception
    anywhere leaves a state that can be used, and a copy costs nothing until one of two goes on.

    Attributes:
        cache: One cache a layer, of one sequence.
        pending: The last token; None before the first, or where only the state it led to is
            known. An array while it is being computed.
    """

    def __init__(self, cache: Iterable[GriffinCache], pending: int | None = None) -> None:
        self.cache = shallow_copies(cache)
        self.pending: int | mx.array | None = pending
        self.evaluate()

    @property
    def tokens_seen(self) -> int:
        return self.cache[0].offset + (self.pending is not None)

    @property
    def last_token(self) -> int | None:
        if isinstance(self.pending, mx.array):
            value: Any = self.pending.item()
            self.pending = int(value)
        return self.pending

    def evaluate(self) -> None:
        """Compute what is left to compute: no other thread could."""
        refuse_forked_process()
        mx.eval(_arrays(self.cache))

    def copy(self) -> TextState:
        """A state that goes on by itself; arrays are shared until one of the two does."""
        return TextState(self.cache, self.last_token)

    def restore(self, other: TextState) -> None:
        """Go to where another state is, which stays there."""
        self.cache, self.pending = shallow_copies(other.cache), other.last_token

    def advance(self, model: Model, tokens: Sequence[int]) -> None:
        """Read all but the last of some tokens, which is then the last seen."""
        cache = self.cache
        if len(tokens) > 1:
            cache = shallow_copies(cache)
            model.prefill(mx.array([tokens[:-1]]), cache)
            mx.eval(_arrays(cache))
            if len(tokens) > 2:
                mx.clear_cache()
        self.cache, self.pending = cache, tokens[-1]

    def steps(
        self,
        model: Model,
        max_tokens: int,
        sampler: Sampler | None,
        processors: Processors,
    ) -> Iterator[tuple[int, mx.array]]:
        """Write tokens; the next one is computed while one is handed out.

        Args:
            model: The model that made the state.
            max_tokens: How many; -1 for no limit.
            sampler: From log-probabilities (1, vocab_size) to a token (1,); greedy by default.
            processors: What the logits go through before.

        Yields:
            A token and its log-probabilities (vocab_size,). The token is the last one seen then.

        Raises:
            UserError: If the state was changed in between.
        """
        choose = sampler or greedy

        def step(cache: Sequence[GriffinCache], token: mx.array) -> tuple[mx.array, mx.array]:
            logits = processors(model(token[:, None], cache=cache)[:, -1])
            logprobs = log_softmax(logits)
            return choose(logprobs), logprobs.squeeze(0)

        ahead = shallow_copies(self.cache)
        token, logprobs = step(ahead, mx.array([self.last_token]))
        mx.async_eval(token, logprobs, _arrays(ahead))
        n = 0
        while True:
            n += 1
            behind = self.cache = ahead
            self.pending = token
            processors.append(token)
            if n == 1:
                mx.eval(token)  # before the next one is begun, which would delay it
            if n != max_tokens:
                ahead = shallow_copies(behind)
                next_token, next_logprobs = step(ahead, token)
                _share_rings(behind, ahead)
                mx.async_eval(next_token, next_logprobs, processors.recent, _arrays(ahead))
            value = self.last_token
            assert value is not None  # it has just been set
            yield value, logprobs
            if n == max_tokens:
                return
            if self.cache is not behind or self.pending != value:
                raise UserError("the session was changed while this stream was paused.")
            token, logprobs = next_token, next_logprobs
            if n % 256 == 0:
                mx.clear_cache()


def shallow_copies(cache: Iterable[GriffinCache]) -> tuple[GriffinCache, ...]:
    """Caches of their own over the same arrays: what one of them reads reaches no other."""
    return tuple(copy.copy(layer) for layer in cache)


def _arrays(cache: Iterable[GriffinCache]) -> list[mx.array]:
    return [a for layer in cache for a in vars(layer).values() if isinstance(a, mx.array)]


def _share_rings(behind: Iterable[GriffinCache], ahead: Iterable[GriffinCache]) -> None:
    """Give the caches before a token the rings after it, so that these are written in place.

    Nothing is lost: a ring has one slot more than a query looks back, and the one that the token
    was written to is the one that a query in its place does not see.
    """
    for before, after in zip(behind, ahead, strict=True):
        if isinstance(before, AttentionCache) and isinstance(after, AttentionCache):
            before.kv = after.kv
