"""Plain decoding, token by token, and logits processors that are shown a bounded past."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

import mlx.core as mx

from mlx_rgemma.griffin.cache import GriffinCache
from mlx_rgemma.griffin.model import Model
from mlx_rgemma.ops.streams import generation_stream
from mlx_rgemma.ops.sums import log_softmax

LogitsProcessor = Callable[[mx.array, mx.array], mx.array]
Sampler = Callable[[mx.array], mx.array]

CONTEXT_LIMIT = 4096
"""Most recent tokens that logits processors are shown."""


class Processors:
    """Logits processors, and the last `CONTEXT_LIMIT` tokens, which they are shown.

    Args:
        processors: Functions of (the last tokens, logits (1, V)) to logits.
        recent: The tokens that came before, (L,), int.

    Attributes:
        recent: The last of them, int32. To be evaluated with every token: a processor that does not
            look at it would leave a graph that grows.
    """

    def __init__(self, processors: Sequence[LogitsProcessor], recent: list[int] | mx.array) -> None:
        self.processors = processors
        last = recent[-CONTEXT_LIMIT:] if processors else []
        self.recent = mx.array(last).astype(mx.int32)

    def append(self, tokens: mx.array) -> None:
        """Take note of tokens."""
        if self.processors:
            self.recent = self._with(tokens)

    def __call__(self, logits: mx.array, drafted: mx.array | None = None) -> mx.array:
        """Logits (1, V) behind the tokens seen, and those that have only been drafted."""
        if self.processors:
            recent = self.recent if drafted is None else self._with(drafted)
            for process in self.processors:
                logits = process(recent, logits)
        return logits

    def _with(self, tokens: mx.array) -> mx.array:
        return mx.concatenate([self.recent, tokens.astype(mx.int32)])[-CONTEXT_LIMIT:]


def greedy(logprobs: mx.array) -> mx.array:
    """The most probable token."""
    return mx.argmax(logprobs, axis=-1)


def generate_step(
    prompt: mx.array,
    model: Model,
    *,
    prompt_cache: list[GriffinCache],
    max_tokens: int = 256,
    sampler: Sampler | None = None,
    logits_processors: Sequence[LogitsProcessor] | None = None,
    prefill_step_size: int = 2048,
    prompt_progress_callback: Callable[[int, int], object] | None = None,
) -> Generator[tuple[int, mx.array, bool], None, None]:
    """Generate token by token, like `mlx_lm.generate.generate_step`.

    The first token comes with the last chunk of the prompt, where mlx-lm takes a step of its own
    and begins the next before it hands out any.

    When it ends, or is closed, the state has read every token that was handed out.

    Args:
        prompt: (L,), int.
        model: The model that writes.
        prompt_cache: Its state; updated in place.
        max_tokens: How many tokens to write at most; -1 for no limit.
        sampler: From log-probabilities (1, V) to a token (1,); greedy by default.
        logits_processors: Functions of (the last tokens, logits) to logits.
        prefill_step_size: Prompt tokens to read at a time.
        prompt_progress_callback: Called with the tokens read so far and their number.

    Yields:
        A token, the log-probabilities (V,) that the model had for it, and that it was not drafted.
    """
    choose = sampler or greedy
    progress = prompt_progress_callback or (lambda done, total: None)
    processors = Processors(logits_processors or (), prompt)

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
    while total - done > prefill_step_size:
        with mx.stream(generation_stream):
            model.prefill(prompt[None, done : done + prefill_step_size], prompt_cache)
            mx.eval([layer.state for layer in prompt_cache])
            mx.clear_cache()
        done += prefill_step_size
        progress(done, total)

    token, logprobs = step(prompt[done:])
    mx.eval(token)
    progress(total, total)
    try:
        yield _value(token), logprobs, False
    finally:
        following = step(token)
    written = 1
    while written != max_tokens:
        token, logprobs = following
        following = step(token)
        yield _value(token), logprobs, False
        written += 1
        if written % 256 == 0:
            mx.clear_cache()


def _value(token: mx.array) -> int:
    value: Any = token.item()
    return int(value)
