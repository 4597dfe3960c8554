"""The decode loop: prefill, then one token per step, and logits processors with a bounded past."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Protocol

import mlx.core as mx

from mlx_rgemma.griffin.cache import GriffinCache
from mlx_rgemma.ops.streams import generation_stream
from mlx_rgemma.ops.sums import log_softmax

LogitsProcessor = Callable[[mx.array, mx.array], mx.array]
Sampler = Callable[[mx.array], mx.array]
Steps = Generator[tuple[int, mx.array, bool], None, None]
"""Tokens, each with its log-probabilities (V,) and whether it was drafted."""

CONTEXT_LIMIT = 4096
"""Most recent tokens that logits processors are given."""


class Decodable(Protocol):
    """The part of `Model` that the decode loop calls."""

    def prefill(self, tokens: mx.array, cache: Sequence[GriffinCache]) -> None: ...

    def last_logits(self, tokens: mx.array, cache: Sequence[GriffinCache]) -> mx.array: ...


class Processors:
    """Logits processors, and the last `CONTEXT_LIMIT` tokens, which are their first argument.

    Args:
        processors: Functions of (the last tokens, logits (1, V)) to logits.
        recent: The preceding tokens, (L,), int.

    Attributes:
        recent: The last of them, int32. Evaluate it with every token: a processor that does not
            use it would leave a growing graph.
    """

    def __init__(self, processors: Sequence[LogitsProcessor], recent: list[int] | mx.array) -> None:
        self.processors = processors
        last = recent[-CONTEXT_LIMIT:] if processors else []
        self.recent = mx.array(last).astype(mx.int32)

    def append(self, tokens: mx.array) -> None:
        """Add tokens to the past."""
        if self.processors:
            self.recent = self._with(tokens)

    def __call__(self, logits: mx.array, drafted: mx.array | None = None) -> mx.array:
        """Return processed logits, (1, V), of the token after the past and the drafted tokens."""
        if self.processors:
            recent = self.recent if drafted is None else self._with(drafted)
            for process in self.processors:
                logits = process(recent, logits)
        return logits

    def _with(self, tokens: mx.array) -> mx.array:
        return mx.concatenate([self.recent, tokens.astype(mx.int32)])[-CONTEXT_LIMIT:]


def greedy(logprobs: mx.array) -> mx.array:
    """Return the most probable token."""
    return mx.argmax(logprobs, axis=-1)


def prefill_chunks(
    prompt: mx.array, model: Decodable, cache: Sequence[GriffinCache], chunk_size: int
) -> Iterator[mx.array]:
    """Read a prompt, (L,), in chunks; yields each after it has been read."""
    for first in range(0, prompt.size, chunk_size):
        chunk = prompt[first : first + chunk_size]
        with mx.stream(generation_stream):
            model.prefill(chunk[None], cache)
            mx.eval([layer.state for layer in cache])
        yield chunk
        mx.clear_cache()


def generate_step(
    prompt: mx.array,
    model: Decodable,
    *,
    prompt_cache: list[GriffinCache],
    max_tokens: int = 256,
    sampler: Sampler | None = None,
    logits_processors: Sequence[LogitsProcessor] | None = None,
    prefill_step_size: int = 2048,
    prompt_progress_callback: Callable[[int, int], object] | None = None,
    recent: list[int] | None = None,
    read_last: bool = True,
) -> Steps:
    """Generate token by token, like `mlx_lm.generate.generate_step`.

    The first token is computed with the last chunk of the prompt and yielded before the next step
    begins. (mlx-lm reads the last prompt token in a step of its own.) Later tokens are yielded
    while the next one is computed.

    When it ends, or is closed, the state has read every token that was yielded.

    Args:
        prompt: (L,), int.
        model: The model.
        prompt_cache: Its state; updated in place.
        max_tokens: Tokens to generate at most; -1 for no limit.
        sampler: From log-probabilities (1, V) to a token (1,); greedy by default.
        logits_processors: Functions of (the last tokens, logits) to logits.
        prefill_step_size: Prompt tokens to read at a time.
        prompt_progress_callback: Called with the prompt tokens read so far and their number.
        recent: The past of the logits processors, in place of the prompt.
        read_last: Whether the state is to read the last token as well. The state of a session does
            not: it keeps that token separately.

    Yields:
        A token, the log-probabilities (V,) that it was drawn from, and False: it was not drafted.
    """
    choose = sampler or greedy
    progress = prompt_progress_callback or (lambda done, total: None)
    processors = Processors(logits_processors or (), prompt if recent is None else recent)

    def step(tokens: mx.array) -> tuple[mx.array, mx.array]:
        with mx.stream(generation_stream):
            logits = processors(model.last_logits(tokens[None], prompt_cache))
            logprobs = log_softmax(logits)
            token = choose(logprobs)
            processors.append(token)
            mx.async_eval(token, logprobs, processors.recent)
        return token, logprobs.squeeze(0)

    done, total = 0, prompt.size
    progress(done, total)
    whole_chunks = prompt[: (total - 1) // prefill_step_size * prefill_step_size]
    for chunk in prefill_chunks(whole_chunks, model, prompt_cache, prefill_step_size):
        done += chunk.size
        progress(done, total)

    token, logprobs = step(prompt[done:])
    mx.eval(token)
    progress(total, total)
    try:
        yield _value(token), logprobs, False
    finally:
        if read_last or max_tokens != 1:
            following = step(token)
    written = 1
    while written != max_tokens:
        token, logprobs = following
        written += 1
        if read_last or written != max_tokens:
            following = step(token)
        yield _value(token), logprobs, False
        if written % 256 == 0:
            mx.clear_cache()


def _value(token: mx.array) -> int:
    value: Any = token.item()
    return int(value)
