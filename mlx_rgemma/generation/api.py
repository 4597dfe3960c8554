"""`generate` and `stream_generate`: mlx-lm's interface, in constant memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import mlx.core as mx

from mlx_rgemma.generation.decode import LogitsProcessor, Sampler, generate_step
from mlx_rgemma.generation.options import (
    SamplingOptions,
    check_max_tokens,
    check_number,
    suggest,
)
from mlx_rgemma.generation.prompts import Prompt, encode_prompt
from mlx_rgemma.generation.response import GenerationResponse, text_responses
from mlx_rgemma.generation.speculative import DRAFT_TOKENS, SpeculationStats, speculative_steps
from mlx_rgemma.griffin.cache import GriffinCache, state_nbytes
from mlx_rgemma.griffin.model import Model
from mlx_rgemma.ops.streams import generation_stream, wired_limit


@suggest
def stream_generate(
    model: Model,
    tokenizer: Any,
    prompt: Prompt,
    max_tokens: int = 256,
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
    prompt_cache: list[GriffinCache] | None = None,
    prefill_step_size: int = 2048,
    prompt_progress_callback: Callable[[int, int], object] | None = None,
    draft_model: Model | None = None,
    num_draft_tokens: int = DRAFT_TOKENS,
    prompt_lookup: int = 0,
    speculation_stats: SpeculationStats | None = None,
) -> Iterator[GenerationResponse]:
    """Generate text piece by piece.

    Memory does not depend on the number of tokens: the prompt is read in chunks, and neither the
    tokens nor the text are kept.

    Args:
        model: From `load`.
        tokenizer: From `load`.
        prompt: A text, used verbatim as in mlx-lm; token ids; or a list of chat messages
            (mappings with "role" and "content"), to which the chat template is applied.
        max_tokens: Tokens to generate at most; -1 for no limit.
        temp: Sampling temperature; 0 takes the most probable token.
        top_p: Keep the most probable tokens of this total probability; 1 for all.
        min_p: Keep tokens of at least this share of the highest probability; 0 for all.
        min_tokens_to_keep: Tokens that `min_p` keeps in any case.
        top_k: Keep this many of the most probable tokens; 0 for all.
        xtc_probability: Probability per token of excluding the top choices (XTC).
        xtc_threshold: Probability from which on XTC excludes a token.
        seed: Seeds MLX's random numbers of the whole process before the first token.
        repetition_penalty: Divides positive logits of recent tokens, multiplies negative ones.
        presence_penalty: Subtracted from the logits of recent tokens.
        frequency_penalty: Subtracted once per occurrence.
        repetition_context_size, presence_context_size, frequency_context_size: Recent tokens that
            each penalty covers.
        logit_bias: Added to the logits of these tokens.
        sampler: A function of log-probabilities (1, V) to tokens (1,), in place of `temp` to
            `xtc_threshold`.
        logits_processors: Functions of (the last tokens, logits) to logits, applied after the
            penalties. They get at most `CONTEXT_LIMIT` tokens.
        stop: Texts that end the generation; they are not part of the output.
        prompt_cache: A state to continue, from `model.make_cache()`; updated in place.
        prefill_step_size: Prompt tokens to read at a time.
        prompt_progress_callback: Called with the prompt tokens read so far and their number.
        draft_model: A smaller model with the same vocabulary, for speculative decoding.
        num_draft_tokens: Tokens that it drafts per pass.
        prompt_lookup: Tokens to draft per pass from the text so far, without a draft model.
        speculation_stats: Filled in while speculating.

    Yields:
        A `GenerationResponse`; the last one has a `finish_reason`, "stop" or "length".

    Raises:
        UserError: If the prompt is empty, holds an unknown token or malformed messages, an option
            is out of bounds, or the draft model does not fit.
    """
    sampling = SamplingOptions.of(locals())
    check_max_tokens(max_tokens)
    check_number("prefill_step_size", prefill_step_size, 1, whole=True)
    vocab_size = model.args.vocab_size
    tokens = encode_prompt(tokenizer, prompt, vocab_size)
    speculative = draft_model is not None or bool(prompt_lookup)
    choose, processors = sampling.functions(
        tokenizer,
        vocab_size,
        sampler=sampler,
        logits_processors=logits_processors,
        speculative=speculative,
    )
    if seed is not None:
        mx.random.seed(seed)
    common: dict[str, Any] = {
        "max_tokens": max_tokens,
        "prompt_cache": model.make_cache() if prompt_cache is None else prompt_cache,
        "sampler": choose,
        "logits_processors": processors,
        "prefill_step_size": prefill_step_size,
        "prompt_progress_callback": prompt_progress_callback,
    }
    if speculative:
        steps = speculative_steps(
            tokens,
            model,
            draft_model=draft_model,
            num_draft_tokens=num_draft_tokens,
            prompt_lookup=prompt_lookup,
            stats=speculation_stats,
            **common,
        )
    else:
        steps = generate_step(tokens, model, **common)
    with wired_limit(model, generation_stream):
        tic = time.perf_counter()
        with closing(steps):
            yield from text_responses(
                steps, tokenizer, max_tokens, stop=stop, prompt_tokens=tokens.size, started=tic
            )


@suggest
def generate(
    model: Model,
    tokenizer: Any,
    prompt: Prompt,
    verbose: bool = False,
    *,
    max_tokens: int = 256,
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
    prompt_cache: list[GriffinCache] | None = None,
    prefill_step_size: int = 2048,
    prompt_progress_callback: Callable[[int, int], object] | None = None,
    draft_model: Model | None = None,
    num_draft_tokens: int = DRAFT_TOKENS,
    prompt_lookup: int = 0,
    speculation_stats: SpeculationStats | None = None,
) -> str:
    """Generate a text as one string.

        generate(model, tokenizer, "Once upon a time", temp=0.8, top_p=0.95)
        generate(model, tokenizer, [{"role": "user", "content": "Why is the sky blue?"}])

    Args:
        verbose: Whether to print the text while it is generated, and mlx-lm's statistics after it.

    All other arguments are those of `stream_generate`.

    Returns:
        The text without the prompt.
    """
    options = dict(locals())
    del options["verbose"]
    if verbose:
        print("=" * 10)
    pieces = []
    response = None
    if speculation_stats is None and (draft_model is not None or prompt_lookup):
        options["speculation_stats"] = SpeculationStats()
    cache = options["prompt_cache"] = prompt_cache or model.make_cache()
    try:
        for response in stream_generate(**options):
            if verbose:
                print(response.text, end="", flush=True)
            pieces.append(response.text)
    finally:
        if verbose and response is not None:
            print(f"\n{'=' * 10}\n{statistics(response, state_nbytes(cache))}", flush=True)
            if options["speculation_stats"] is not None:
                print(options["speculation_stats"], flush=True)
    return "".join(pieces)


def statistics(response: GenerationResponse, state_bytes: int) -> str:
    """Return mlx-lm's statistics of a generation, and the size of the state."""
    return (
        f"Prompt: {response.prompt_tokens} tokens, {response.prompt_tps:.3f} tokens-per-sec\n"
        f"Generation: {response.generation_tokens} tokens,"
        f" {response.generation_tps:.3f} tokens-per-sec\n"
        f"Peak memory: {response.peak_memory:.3f} GB\n"
        f"State: {state_bytes / 1e6:.3f} MB, at any length"
    )
