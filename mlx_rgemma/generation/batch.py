"""Generate for several prompts at once with mlx-lm's continuous batching."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_rgemma.errors import UserError, shown
from mlx_rgemma.generation.decode import LogitsProcessor, Sampler
from mlx_rgemma.generation.options import SamplingOptions, check_number, suggest
from mlx_rgemma.generation.prompts import Prompt, encode_prompt
from mlx_rgemma.griffin.cache import GriffinCache
from mlx_rgemma.griffin.model import Model
from mlx_rgemma.ops.backend import compile_seconds
from mlx_rgemma.tokenizers.detokenizer import StopSequences, StreamingDetokenizer

if TYPE_CHECKING:
    from mlx_lm.generate_utils import BatchStats


@dataclass
class BatchResponse:
    """Results of `batch_generate`, in the order of the prompts.

    Attributes:
        texts: The generated texts.
        token_ids: Their tokens, without the one that ended them.
        finish_reasons: "stop" or "length".
        stats: mlx-lm's statistics of the whole batch.
        caches: Each prompt's state after its last token, if requested.
    """

    texts: list[str]
    token_ids: list[list[int]]
    finish_reasons: list[str]
    stats: BatchStats
    caches: list[list[GriffinCache]] | None = None


class _Sequence:
    """The text and tokens generated so far for one prompt."""

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self.stream = StreamingDetokenizer(tokenizer)
        self.stops = StopSequences(stop)
        self.pieces: list[str] = []
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self.cache: list[GriffinCache] | None = None

    def add(self, token: int, finish_reason: str | None, ended: bool) -> bool:
        """Add a token; return whether a stop text has appeared."""
        text = "" if ended else self.stream.add(token)
        if not ended:
            self.tokens.append(token)
        if finish_reason is not None:
            text += self.stream.finish()
        text, stopped = self.stops.feed(text, last=finish_reason is not None)
        self.pieces.append(text)
        self.finish_reason = "stop" if stopped else finish_reason
        return stopped


@suggest
def batch_generate(
    model: Model,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    max_tokens: int | list[int] = 128,
    *,
    temp: float = 0.0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    min_tokens_to_keep: int = 1,
    top_k: int = 0,
    xtc_probability: float = 0.0,
    xtc_threshold: float = 0.1,
    seed: int | None = None,
    repetition_penalty: float | None = None,
    repetition_context_size: int = 20,
    presence_penalty: float | None = None,
    presence_context_size: int = 20,
    frequency_penalty: float | None = None,
    frequency_context_size: int = 20,
    logit_bias: Mapping[int, float] | None = None,
    sampler: Sampler | None = None,
    logits_processors: Sequence[LogitsProcessor] | None = None,
    stop: str | Sequence[str] = (),
    return_prompt_caches: bool = False,
    prompt_caches: list[list[GriffinCache]] | None = None,
    prefill_step_size: int = 2048,
    completion_batch_size: int = 32,
    prefill_batch_size: int = 8,
) -> BatchResponse:
    """Generate a text for each of several prompts at once, the same as one by one.

    Args:
        model, tokenizer: From `load`.
        prompts: Texts, token ids or lists of chat messages, as for `stream_generate`.
        max_tokens: Tokens to generate at most, for all or for each.
        stop: Texts that end a generation; they are not part of the output.
        return_prompt_caches: Whether to return each prompt's state.
        prompt_caches: A state per prompt to continue.
        prefill_step_size: Prompt tokens to read at a time.
        completion_batch_size: Sequences that are decoded together.
        prefill_batch_size: Prompts that are read together.

    The arguments from `temp` to `logits_processors` are those of `stream_generate`.

    Returns:
        A `BatchResponse`.

    Raises:
        UserError: If a prompt is empty, holds an unknown token or malformed messages, or an option
            is out of bounds, or a state belongs to another model.
    """
    sampling = SamplingOptions.of(locals())
    from mlx_lm.generate import BatchGenerator

    if isinstance(prompts, str) or any(isinstance(prompt, Mapping) for prompt in prompts):
        raise UserError("prompts is a single prompt: put it in a list.")
    if not prompts:
        raise UserError("there are no prompts.")
    limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else list(max_tokens)
    if len(limits) != len(prompts) or min(limits) < 1:
        raise UserError(f"max_tokens is {shown(max_tokens)}, expected at least 1 for each prompt.")
    sizes = {
        "prefill_step_size": prefill_step_size,
        "completion_batch_size": completion_batch_size,
        "prefill_batch_size": prefill_batch_size,
    }
    for name, size in sizes.items():
        check_number(name, size, 1, whole=True)
    stop = [stop] if isinstance(stop, str) else stop
    if prompt_caches is not None:
        _check_caches(model, prompt_caches, len(prompts))
    known = model.args.vocab_size
    tokens: list[Any] = [encode_prompt(tokenizer, prompt, known).tolist() for prompt in prompts]
    choose, processors = sampling.functions(
        tokenizer, known, sampler=sampler, logits_processors=logits_processors
    )
    if seed is not None:
        mx.random.seed(seed)

    started = time.perf_counter()
    generator = BatchGenerator(
        model,
        stop_tokens=[[t] for t in tokenizer.eos_token_ids],
        sampler=choose,
        logits_processors=processors,
        **sizes,
    )
    uids = generator.insert(tokens, limits, caches=prompt_caches)
    sequences = {uid: _Sequence(tokenizer, stop) for uid in uids}
    try:
        with generator.stats() as stats:
            while responses := generator.next_generated():
                for response in responses:
                    sequence = sequences[response.uid]
                    ended = response.token in tokenizer.eos_token_ids
                    stopped = sequence.add(response.token, response.finish_reason, ended)
                    if response.finish_reason is not None:
                        sequence.cache = response.prompt_cache
                    elif stopped:
                        cache = generator.remove([response.uid], return_prompt_caches=True)
                        sequence.cache = cache[response.uid][0]
    finally:
        generator.close()
    _subtract_compilation(stats, compile_seconds(started))
    answers = list(sequences.values())
    return BatchResponse(
        texts=["".join(answer.pieces) for answer in answers],
        token_ids=[answer.tokens for answer in answers],
        finish_reasons=[answer.finish_reason or "length" for answer in answers],
        stats=stats,
        caches=[answer.cache or [] for answer in answers] if return_prompt_caches else None,
    )


def _check_caches(model: Model, caches: list[list[GriffinCache]], prompts: int) -> None:
    """Refuse anything but one state of one sequence per prompt."""
    if len(caches) != prompts:
        raise UserError(f"there are {len(caches)} prompt_caches for {prompts} prompts.")
    for cache in caches:
        try:
            model.check_cache(cache)
        except ValueError as error:
            raise UserError(str(error)) from error
        if any(layer.batch_size != 1 for layer in cache):
            raise UserError("each of prompt_caches must be the state of one sequence.")


def _subtract_compilation(stats: BatchStats, seconds: float) -> None:
    """Exclude kernel compilation, usually during the first prompt, from the speeds."""
    stats.wall_time -= seconds
    if seconds < stats.prompt_time:
        stats.prompt_time -= seconds
