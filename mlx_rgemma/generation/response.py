"""Turn the tokens of a decode loop into responses with text, counts and finish reason."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_rgemma.ops.backend import compile_seconds
from mlx_rgemma.tokenizers.detokenizer import StopSequences, StreamingDetokenizer


@dataclass
class GenerationResponse:
    """A token, the text that it completes, and statistics, with mlx-lm's fields.

    Attributes:
        text: The next piece of the text; may be empty.
        token: The token.
        logprobs: (vocab_size,). The log-probabilities that it was drawn from.
        from_draft: Whether it was drafted and accepted.
        prompt_tokens: Prompt tokens read.
        prompt_tps: Prompt tokens per second.
        generation_tokens: Tokens generated.
        generation_tps: Generated tokens per second.
        peak_memory: Peak memory of MLX so far, in GB.
        finish_reason: "stop" or "length" in the last response, otherwise None.
    """

    text: str
    token: int
    logprobs: mx.array
    from_draft: bool
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    peak_memory: float
    finish_reason: str | None = None


def text_responses(
    steps: Iterable[tuple[int, mx.array, bool]],
    tokenizer: Any,
    max_tokens: int,
    *,
    stop: str | Sequence[str],
    prompt_tokens: int,
    started: float,
    after: int | None = None,
) -> Iterator[GenerationResponse]:
    """Yield one response per token until EOS, a stop text or the limit.

    Args:
        steps: The tokens, each with its log-probabilities (vocab_size,) and whether it was drafted.
        tokenizer: From `load`.
        max_tokens: Number of tokens at most; -1 for no limit.
        stop: Texts that end the generation; they are not part of the output.
        prompt_tokens: How many tokens were read before.
        started: When reading them began, by `time.perf_counter`, in seconds.
        after: The last token of the text before, if the output continues it.

    Yields:
        A `GenerationResponse`; the last one has a `finish_reason`, "stop" or "length".
    """
    stops = StopSequences([stop] if isinstance(stop, str) else stop)
    text = StreamingDetokenizer(tokenizer, after=after)
    prompt_tps = 0.0
    for n, (token, logprobs, from_draft) in enumerate(steps, start=1):
        if n == 1:
            prompt_tps = prompt_tokens / seconds_since(started)
            started = time.perf_counter()
        ended = token in tokenizer.eos_token_ids
        segment = text.finish() if ended else text.add(token)
        if not ended and n == max_tokens:
            segment += text.finish()
        segment, stopped = stops.feed(segment, last=ended or n == max_tokens)
        reason = "stop" if ended or stopped else "length" if n == max_tokens else None
        yield GenerationResponse(
            text=segment,
            token=token,
            logprobs=logprobs,
            from_draft=from_draft,
            prompt_tokens=prompt_tokens,
            prompt_tps=prompt_tps,
            generation_tokens=n,
            generation_tps=n / seconds_since(started),
            peak_memory=mx.get_peak_memory() / 1e9,
            finish_reason=reason,
        )
        if reason is not None:
            return


def seconds_since(since: float) -> float:
    """Return the seconds since a moment, without those spent compiling CPU kernels."""
    return time.perf_counter() - since - compile_seconds(since)
