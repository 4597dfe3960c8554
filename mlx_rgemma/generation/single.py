"""Generating text: mlx-lm's loop and samplers, with a state and a memory that do not grow."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import mlx.core as mx

from mlx_rgemma.errors import UserError
from mlx_rgemma.generation.decoding import LogitsProcessor, plain_steps
from mlx_rgemma.generation.device import generation_stream, wired_limit
from mlx_rgemma.generation.speculation import DRAFT_TOKENS, SpeculationStats, speculative_steps
from mlx_rgemma.griffin.cache import GriffinCache, state_nbytes
from mlx_rgemma.griffin.indices import as_list, check_token_ids
from mlx_rgemma.griffin.model import Model
from mlx_rgemma.griffin.process import refuse_forked_process
from mlx_rgemma.text.responses import GenerationResponse, text_responses

Prompt = str | Sequence[int] | mx.array


def stream_generate(
    model: Model,
    tokenizer: Any,
    prompt: Prompt,
    max_tokens: int = 256,
    *,
    stop: str | Sequence[str] = (),
    prompt_cache: list[GriffinCache] | None = None,
    logits_processors: Sequence[LogitsProcessor] | None = None,
    draft_model: Model | None = None,
    num_draft_tokens: int = DRAFT_TOKENS,
    prompt_lookup: int = 0,
    speculation_stats: SpeculationStats | None = None,
    **kwargs: Any,
) -> Iterator[GenerationResponse]:
    """Generate text piece by piece.

    Memory does not depend on the number of tokens read or written: the prompt is read in chunks,
    and neither the tokens nor the text are kept.

    Args:
        model: From `load`.
        tokenizer: From `load`.
        prompt: Text, or token ids.
        max_tokens: How many tokens to write at most; -1 for no limit.
        stop: Texts that end the generation; they are not part of the output.
        prompt_cache: A state to continue, from `model.make_cache()`; updated in place.
        logits_processors: Functions of (the last tokens, logits) to logits, from
            `mlx_lm.sample_utils.make_logits_processors`. They see at most `CONTEXT_LIMIT` tokens.
        draft_model: A smaller model with the same vocabulary, for speculative decoding. A
            `mlx_rgemma.generation.sampling.Sampler` as `sampler` keeps most of its drafts.
        num_draft_tokens: Tokens that it drafts at a time.
        prompt_lookup: Tokens to draft at a time from the text so far, without a draft model.
        speculation_stats: Filled in while speculating.
        **kwargs: Those of `mlx_lm.generate.generate_step`: `sampler`, `prefill_step_size`,
            `prompt_progress_callback`.

    Yields:
        A `GenerationResponse`; the last one has a `finish_reason`, "stop" or "length".

    Raises:
        UserError: If the prompt is empty or holds an unknown token, `max_tokens` is no count, or
            the draft model does not fit.
    """
    if max_tokens < 1 and max_tokens != -1:
        raise UserError(f"max_tokens is {max_tokens}, expected at least 1 (or -1 for no limit).")
    tokens = encode(tokenizer, prompt, model.args.vocab_size)
    cache = model.make_cache() if prompt_cache is None else prompt_cache
    common: dict[str, Any] = {"max_tokens": max_tokens, "prompt_cache": cache, **kwargs}
    if draft_model is None and not prompt_lookup:
        steps = plain_steps(tokens, model, logits_processors=logits_processors, **common)
    else:
        steps = speculative_steps(
            tokens,
            model,
            draft_model=draft_model,
            num_draft_tokens=num_draft_tokens,
            prompt_lookup=prompt_lookup,
            stats=speculation_stats,
            logits_processors=logits_processors,
            **common,
        )
    with wired_limit(model, generation_stream):
        tic = time.perf_counter()
        with closing(steps):
            yield from text_responses(
                steps, tokenizer, max_tokens, stop=stop, prompt_tokens=tokens.size, started=tic
            )


def generate(
    model: Model, tokenizer: Any, prompt: Prompt, verbose: bool = False, **kwargs: Any
) -> str:
    """Generate a text as one string.

    Args:
        model, tokenizer, prompt: As for `stream_generate`.
        verbose: Whether to print the text as it comes, and mlx-lm's statistics after it.
        **kwargs: Passed on to `stream_generate`.

    Returns:
        The text without the prompt.
    """
    if verbose:
        print("=" * 10)
    pieces = []
    response = None
    if kwargs.get("draft_model") is not None or kwargs.get("prompt_lookup"):
        kwargs.setdefault("speculation_stats", SpeculationStats())
    cache = kwargs.pop("prompt_cache", None) or model.make_cache()
    try:
        for response in stream_generate(model, tokenizer, prompt, prompt_cache=cache, **kwargs):
            if verbose:
                print(response.text, end="", flush=True)
            pieces.append(response.text)
    finally:
        if verbose and response is not None:
            print(f"\n{'=' * 10}\n{statistics(response, state_nbytes(cache))}", flush=True)
            if kwargs.get("speculation_stats") is not None:
                print(kwargs["speculation_stats"], flush=True)
    return "".join(pieces)


def statistics(response: GenerationResponse, state_bytes: int) -> str:
    """mlx-lm's lines about a generation, and the size of the state."""
    return (
        f"Prompt: {response.prompt_tokens} tokens, {response.prompt_tps:.3f} tokens-per-sec\n"
        f"Generation: {response.generation_tokens} tokens,"
        f" {response.generation_tps:.3f} tokens-per-sec\n"
        f"Peak memory: {response.peak_memory:.3f} GB\n"
        f"State: {state_bytes / 1e6:.3f} MB, at any length"
    )


def apply_chat_template(
    tokenizer: Any,
    prompt: str,
    *,
    system_prompt: str | None = None,
    response: str | None = None,
    config: str | None = None,
) -> str:
    """The text of a chat with one question, ready for the model's answer.

    Args:
        tokenizer: From `load`, with a chat template.
        prompt: The user's message.
        system_prompt: A system message; Gemma's own template knows none.
        response: How the answer begins.
        config: JSON object with more arguments for the template.

    Raises:
        UserError: If the template refuses the messages or `config` is no JSON object.
    """
    options = template_options(config)
    messages = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    messages.append({"role": "user", "content": prompt})
    if response is not None:
        messages.append({"role": "assistant", "content": response})
    try:
        return tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            continue_final_message=response is not None,
            add_generation_prompt=response is None,
            **options,
        )
    except Exception as error:  # templates raise errors of their own making
        raise UserError(f"the model's chat template refuses the prompt: {error}.") from error


def template_options(config: str | None) -> dict[str, Any]:
    """The arguments for a chat template that `--chat-template-config` holds.

    Raises:
        UserError: If it is no JSON object.
    """
    import json

    try:
        options = {} if config is None else json.loads(config)
    except json.JSONDecodeError as error:
        raise UserError(f"--chat-template-config is not JSON: {error}.") from error
    if not isinstance(options, dict):
        raise UserError("--chat-template-config must be a JSON object.")
    return options


def encode(tokenizer: Any, prompt: Prompt, vocab_size: int) -> mx.array:
    """Token ids of a prompt, (L,) int32; a text begins with BOS unless it says so itself.

    Raises:
        UserError: If there is no token, or one that the model does not have.
    """
    refuse_forked_process()
    if isinstance(prompt, str):
        bos = tokenizer.bos_token
        special = bos is None or not prompt.startswith(bos)
        prompt = tokenizer.encode(prompt, add_special_tokens=special)
    tokens = check_token_ids(as_list(prompt), vocab_size)
    if not tokens:
        raise UserError("the prompt is empty: it needs at least one token.")
    return mx.array(tokens, mx.int32)
