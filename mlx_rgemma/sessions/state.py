"""The state of one text during prefill and decoding, exact whenever a token is yielded."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from contextlib import closing
from typing import Any

import mlx.core as mx

from mlx_rgemma.errors import UserError
from mlx_rgemma.generation.decode import Steps, generate_step
from mlx_rgemma.griffin.cache import AttentionCache, GriffinCache
from mlx_rgemma.griffin.checks import refuse_forked_process
from mlx_rgemma.griffin.model import Model
from mlx_rgemma.ops.streams import generation_stream


class TextState:
    """Caches that have read every token but the last, and that last token.

    Arrays are replaced, never modified, and caches are replaced as a whole: an exception anywhere
    leaves a usable state, and a copy costs nothing until one of the two is continued.

    Attributes:
        cache: One cache per layer, of one sequence.
        pending: The last token; None before the first, or if only the state after it is known.
    """

    def __init__(self, cache: Iterable[GriffinCache], pending: int | None = None) -> None:
        self.cache = shallow_copies(cache)
        self.pending = pending
        self.evaluate()

    @property
    def tokens_seen(self) -> int:
        return self.cache[0].offset + (self.pending is not None)

    @property
    def last_token(self) -> int | None:
        return self.pending

    def evaluate(self) -> None:
        """Evaluate now: lazy arrays can only be evaluated on the thread that created them."""
        refuse_forked_process()
        mx.eval(_arrays(self.cache))

    def copy(self) -> TextState:
        """Return an independent state; arrays are shared until one of the two is continued."""
        return TextState(self.cache, self.last_token)

    def restore(self, other: TextState) -> None:
        """Become a copy of another state."""
        self.cache, self.pending = shallow_copies(other.cache), other.last_token

    def advance(self, model: Model, tokens: Sequence[int]) -> None:
        """Read all tokens but the last, which becomes the pending one."""
        cache = self.cache
        if len(tokens) > 1:
            cache = shallow_copies(cache)
            with mx.stream(generation_stream):
                model.prefill(mx.array([tokens[:-1]]), cache)
                mx.eval(_arrays(cache))
            if len(tokens) > 2:
                mx.clear_cache()
        self.cache, self.pending = cache, tokens[-1]

    def steps(self, model: Model, max_tokens: int, **options: Any) -> Steps:
        """Generate tokens with `generate_step`; each is the last one seen when it is yielded.

        Args:
            model: The model of the state.
            max_tokens: Tokens to generate at most; -1 for no limit.
            **options: The sampler, logits processors and recent tokens of `generate_step`.

        Yields:
            A token, its log-probabilities (V,), and False: it was not drafted.

        Raises:
            UserError: If the state was changed while the generator was paused.
        """
        reader = _Reader(model, self.cache)
        ahead = list(shallow_copies(self.cache))
        loop = generate_step(
            mx.array([self.last_token]),
            reader,
            prompt_cache=ahead,
            max_tokens=max_tokens,
            read_last=False,
            **options,
        )
        with closing(loop):
            for token, logprobs, drafted in loop:
                if reader.behind[0].offset != self.tokens_seen:  # no step follows this token yet
                    reader.behind = shallow_copies(ahead)
                behind = self.cache = reader.behind
                self.pending = token
                yield token, logprobs, drafted
                if self.cache is not behind or self.pending != token:
                    raise UserError("the session was changed while this stream was paused.")


class _Reader:
    """A model for `generate_step` that keeps the caches as they were before its last step.

    Attributes:
        behind: Caches that have not read the token that the model has just read.
    """

    def __init__(self, model: Model, cache: tuple[GriffinCache, ...]) -> None:
        self.model = model
        self.behind = cache
        self.prefill = model.prefill

    def last_logits(self, tokens: mx.array, cache: Sequence[GriffinCache]) -> mx.array:
        if self.behind[0].offset != cache[0].offset or self.behind[0] is cache[0]:
            self.behind = shallow_copies(cache)
        logits = self.model.last_logits(tokens, cache)
        _share_rings(self.behind, cache)
        # Dispatched now: arrays that are left lazy cannot be evaluated by another thread.
        mx.async_eval(logits, _arrays(cache))
        return logits


def shallow_copies(cache: Iterable[GriffinCache]) -> tuple[GriffinCache, ...]:
    """Return caches over the same arrays that are updated independently (copy-on-write)."""
    return tuple(copy.copy(layer) for layer in cache)


def _arrays(cache: Iterable[GriffinCache]) -> list[mx.array]:
    return [a for layer in cache for a in vars(layer).values() if isinstance(a, mx.array)]


def _share_rings(behind: Iterable[GriffinCache], ahead: Iterable[GriffinCache]) -> None:
    """Give the caches before a token the rings after it, so that those are written in place.

    This is exact: a ring has one slot more than a query looks back, and the slot that the token was
    written to is the one that a query at its position does not see.
    """
    for before, after in zip(behind, ahead, strict=True):
        if isinstance(before, AttentionCache) and isinstance(after, AttentionCache):
            before.kv = after.kv
