"""Speculative decoding: several tokens per pass of the model, with unchanged output.

A drafter proposes tokens and the model reads all of them in one pass. Those that the model would
have generated are accepted, and its state is rolled back to the last of them (`Rollback.trim`).
Greedy output is identical to decoding without drafts. Sampled output has the same distribution: a
token drawn with probability q is accepted with probability min(1, p / q), and the first rejected
one is redrawn from max(p - q, 0) (Leviathan et al., arXiv:2211.17192, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_rgemma.errors import UserError
from mlx_rgemma.generation.decode import LogitsProcessor, Processors, Steps, prefill_chunks
from mlx_rgemma.generation.draft import Draft, Drafter, DraftModel, PromptLookup
from mlx_rgemma.generation.sampling import Sampler
from mlx_rgemma.griffin.cache import GriffinCache
from mlx_rgemma.griffin.model import Model
from mlx_rgemma.ops.sums import log_softmax

DRAFT_TOKENS = 3
"""Default number of tokens per draft."""


@dataclass
class SpeculationStats:
    """Statistics of speculative decoding.

    Attributes:
        drafted: Drafted tokens.
        accepted: Drafted tokens that became part of the text.
        passes: Passes of the model after the prompt.
        tokens: Generated tokens.
    """

    drafted: int = 0
    accepted: int = 0
    passes: int = 0
    tokens: int = 0

    @property
    def acceptance_rate(self) -> float:
        """Share of the drafted tokens that became part of the text."""
        return self.accepted / self.drafted if self.drafted else 0.0

    def __str__(self) -> str:
        return (
            f"Speculation: {100 * self.acceptance_rate:.1f}% of {self.drafted} drafted tokens"
            f" accepted, {self.passes} passes for {self.tokens} tokens"
        )


def speculative_steps(
    prompt: mx.array,
    model: Model,
    *,
    prompt_cache: list[GriffinCache],
    draft_model: Model | None = None,
    num_draft_tokens: int = DRAFT_TOKENS,
    prompt_lookup: int = 0,
    max_tokens: int = 256,
    sampler: Any = None,
    logits_processors: Sequence[LogitsProcessor] | None = None,
    prefill_step_size: int = 2048,
    prompt_progress_callback: Callable[[int, int], object] | None = None,
    stats: SpeculationStats | None = None,
) -> Steps:
    """Generate token by token, like `mlx_lm.generate.generate_step`.

    When it ends, or is closed, the state has read every token that was yielded.

    Args:
        prompt: (L,), int.
        model: The model.
        prompt_cache: Its state, optionally followed by the draft model's; updated in place.
        draft_model: A smaller model with the same vocabulary.
        num_draft_tokens: Tokens that it drafts per pass.
        prompt_lookup: Tokens to draft per pass from the text so far, without a draft model.
        max_tokens: Tokens to generate at most; -1 for no limit.
        sampler: A `Sampler`, or any function of (1, V) log-probabilities to (1,) tokens. Without
            a known distribution fewer drafted tokens are accepted; the output is the same.
        logits_processors: Functions of (the last tokens, logits) to logits.
        prefill_step_size: Prompt tokens to read at a time.
        prompt_progress_callback: Called with the prompt tokens read so far and their number.
        stats: Updated as tokens are yielded.

    Yields:
        A token, the log-probabilities (V,) of the model for it, and whether it was drafted.

    Raises:
        UserError: If the draft model has another vocabulary, or not exactly one drafter is given.
    """
    if (draft_model is None) == (prompt_lookup < 1):
        raise UserError("speculation takes either a draft model or prompt lookup.")
    limit = num_draft_tokens if draft_model is not None else prompt_lookup
    if limit < 1:
        raise UserError(f"the number of draft tokens is {limit}, expected at least 1.")
    models = [model] if draft_model is None else [model, draft_model]
    limit = min(limit, *(m.args.past_window - 1 for m in models))
    if limit < 1:
        raise UserError("an attention window of one token leaves nothing to draft.")
    sampler = Sampler() if sampler is None else sampler
    layers = len(model.layers)
    cache, draft_cache = prompt_cache[:layers], prompt_cache[layers:]
    drafter: Drafter = PromptLookup()
    if draft_model is not None:
        check_vocabulary(model, draft_model)
        draft_cache = draft_cache or draft_model.make_cache()
        drafter = DraftModel(draft_model, draft_cache, sampler, limit)
    stats = SpeculationStats() if stats is None else stats
    processors = Processors(logits_processors or (), prompt[:-1])

    progress = prompt_progress_callback or (lambda done, total: None)
    progress(0, prompt.size)
    done = 0
    for chunk in prefill_chunks(prompt[:-1], model, cache, prefill_step_size):
        drafter.read(chunk)
        done += chunk.size
        progress(done, prompt.size)

    for layer in cache:
        layer.enable_rollback(limit + 1)
    last: Any = prompt[-1].item()
    unread: int | None = None  # the last yielded token, if the model has not read it
    written = 0
    try:
        while written != max_tokens:
            unread = None
            processors.append(mx.array([last]))
            n = limit if max_tokens == -1 else min(limit, max_tokens - written - 1)
            draft = drafter.draft(last, n, processors)
            fed = mx.concatenate([mx.array([last], mx.int32), draft.tokens])
            logits = model(fed[None], cache=cache)[0]
            processed = [processors(logits[i : i + 1], fed[1 : i + 1]) for i in range(fed.size)]
            logprobs = log_softmax(mx.concatenate(processed))
            mx.eval(processors.recent)
            tokens, accepted = verify(draft, logprobs, sampler)
            if written == 0:
                progress(prompt.size, prompt.size)
            stats.passes += 1
            stats.drafted += draft.tokens.size
            yielded = 0
            try:
                for i, token in enumerate(tokens):
                    yielded, from_draft = i + 1, i < accepted
                    stats.tokens += 1
                    stats.accepted += from_draft
                    yield token, logprobs[i], from_draft
            finally:
                kept = min(yielded, accepted)
                for layer in cache:
                    layer.trim(draft.tokens.size - kept)
                drafter.accept(kept)
                processors.append(draft.tokens[:kept])
                if yielded > accepted:
                    unread = last = tokens[accepted]
            written += len(tokens)
    finally:
        for layer in cache:
            layer.enable_rollback(0)
        if unread is not None:
            model.prefill(mx.array([[unread]]), cache)
        drafter.finish(unread)
        mx.eval([layer.state for layer in cache])


def verify(draft: Draft, logprobs: mx.array, sampler: Any) -> tuple[list[int], int]:
    """Accept or reject drafted tokens, and choose the token that follows the accepted ones.

    Args:
        draft: n tokens.
        logprobs: (n + 1, V), fp32, of the model for each drafted token and the one after them.
        sampler: The sampler of the text.

    Returns:
        The tokens, and how many of them were drafted: all but the last.
    """
    n = draft.tokens.size
    if draft.logprobs is None or n == 0:
        # The draft was not sampled: accept the tokens that the model draws as well.
        chosen = mx.concatenate([sampler(logprobs[i : i + 1]) for i in range(n + 1)])
        agree = chosen[:n] == draft.tokens
    else:
        p, q = mx.exp(sampler.distribution(logprobs)), mx.exp(draft.logprobs)
        at = draft.tokens[:, None]
        threshold = mx.random.uniform(shape=(n, 1)) * mx.take_along_axis(q, at, axis=1)
        agree = (threshold < mx.take_along_axis(p[:n], at, axis=1))[:, 0]
        rest = mx.concatenate([mx.maximum(p[:n] - q, 0.0), p[n:]])
        chosen = mx.random.categorical(mx.log(rest))
    answer: Any = mx.concatenate(
        [agree.astype(mx.int32), draft.tokens, chosen.astype(mx.int32)]
    ).tolist()
    agreed = next((i for i in range(n) if not answer[i]), n)
    return [*answer[n : n + agreed], answer[2 * n + agreed]], agreed


def check_vocabulary(
    model: Model, draft_model: Model, tokenizer: Any = None, draft_tokenizer: Any = None
) -> None:
    """Refuse a draft model with another vocabulary.

    Args:
        model, draft_model: The two models.
        tokenizer, draft_tokenizer: Their tokenizers, if available.

    Raises:
        UserError: If the vocabularies differ.
    """
    size, draft_size = model.args.vocab_size, draft_model.args.vocab_size
    if size != draft_size:
        raise UserError(
            f"the draft model has a vocabulary of {draft_size} tokens, the model one of {size}:"
            " they need the same vocabulary."
        )
    if draft_tokenizer is not None and tokenizer.get_vocab() != draft_tokenizer.get_vocab():
        raise UserError("the draft model's vocabulary has other tokens than the model's.")
