"""Speculative decoding: several tokens for one pass of the model, the text unchanged.

A drafter proposes tokens, the model reads them all in one pass, and those that it would have
written itself stay; its state is then taken back to the last of them (`Rollback.trim`). Greedy
output is the model's own. Sampled output has the model's own distribution: a token drawn with
probability q is kept with probability min(1, p / q), and the first one that is not is drawn anew
from max(p - q, 0) (Leviathan et al., arXiv:2211.17192, algorithm 1).
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
"""Tokens of a draft, unless asked otherwise."""


@dataclass
class SpeculationStats:
    """What speculation brought.

    Attributes:
        drafted: Tokens proposed.
        accepted: Tokens proposed that became part of the text.
        passes: Passes of the model, after the prompt.
        tokens: Tokens written.
    """

    drafted: int = 0
    accepted: int = 0
    passes: int = 0
    tokens: int = 0

    @property
    def acceptance_rate(self) -> float:
        """Share of the proposed tokens that became part of the text."""
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

    When it ends, or is closed, the state has read every token that was handed out.

    Args:
        prompt: (L,), int.
        model: The model that writes.
        prompt_cache: Its state; the draft model's, where it is to go on too, behind it.
        draft_model: A smaller model with the same vocabulary.
        num_draft_tokens: Tokens that it drafts at a time.
        prompt_lookup: Tokens drafted at a time from the text so far, without a draft model.
        max_tokens: How many tokens to write at most; -1 for no limit.
        sampler: A `Sampler`, or any function of (1, V) log-probabilities to (1,) tokens. Without
            known probabilities fewer drafted tokens are kept; the distribution is the same.
        logits_processors: Functions of (the last tokens, logits) to logits.
        prefill_step_size: Prompt tokens to read at a time.
        prompt_progress_callback: Called with the tokens read so far and their number.
        stats: Filled in as tokens are handed out.

    Yields:
        A token, the log-probabilities (V,) that the model had for it, whether it was drafted.

    Raises:
        UserError: If the draft model has another vocabulary, or there is no drafter or two.
    """
    if (draft_model is None) == (prompt_lookup < 1):
        raise UserError("speculation takes a draft model or prompt lookup, and not both.")
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
    unread: int | None = None  # the last token handed out, where the model has not read it
    written = 0
    try:
        while written != max_tokens:
            unread = None
            processors.append(mx.array([last]))
            n = limit if max_tokens == -1 else min(limit, max_tokens - written - 1)
            draft = drafter.draft(last, n, processors)
            fed = mx.concatenate([mx.array([last], mx.int32), draft.tokens])
            logits = model(fed[None], cache=cache)[0]
            rows = [processors(logits[i : i + 1], fed[1 : i + 1]) for i in range(fed.size)]
            logprobs = log_softmax(mx.concatenate(rows))
            mx.eval(processors.recent)
            tokens, agreed = verify(draft, logprobs, sampler)
            if written == 0:
                progress(prompt.size, prompt.size)
            stats.passes += 1
            stats.drafted += draft.tokens.size
            handed_out = 0
            try:
                for i, token in enumerate(tokens):
                    handed_out, from_draft = i + 1, i < agreed
                    stats.tokens += 1
                    stats.accepted += from_draft
                    yield token, logprobs[i], from_draft
            finally:
                kept = min(handed_out, agreed)
                for layer in cache:
                    layer.trim(draft.tokens.size - kept)
                drafter.accept(kept)
                processors.append(draft.tokens[:kept])
                if handed_out > agreed:
                    unread = last = tokens[agreed]
            written += len(tokens)
    finally:
        for layer in cache:
            layer.enable_rollback(0)
        if unread is not None:
            model.prefill(mx.array([[unread]]), cache)
        drafter.finish(unread)
        mx.eval([layer.state for layer in cache])


def verify(draft: Draft, logprobs: mx.array, sampler: Any) -> tuple[list[int], int]:
    """Which of the tokens drafted the model keeps, and the token that it puts behind them.

    Args:
        draft: n tokens.
        logprobs: (n + 1, V), fp32. The model's, at each token drafted and behind the last.
        sampler: What the text is sampled with.

    Returns:
        The tokens, and how many of them were drafted: all but the last.
    """
    n = draft.tokens.size
    if draft.logprobs is None or n == 0:
        # Drafts that leave nothing to chance: keeping those that the model draws too is the rule.
        chosen = mx.concatenate([sampler(logprobs[i : i + 1]) for i in range(n + 1)])
        agree = chosen[:n] == draft.tokens
    else:
        p, q = mx.exp(sampler.distribution(logprobs)), mx.exp(draft.logprobs)
        at = draft.tokens[:, None]
        odds = mx.random.uniform(shape=(n, 1)) * mx.take_along_axis(q, at, axis=1)
        agree = (odds < mx.take_along_axis(p[:n], at, axis=1))[:, 0]
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
    """Refuse a draft model whose tokens mean something else.

    Args:
        model, draft_model: The two models.
        tokenizer, draft_tokenizer: Their tokenizers, where at hand.

    Raises:
        UserError: If the vocabularies differ.
    """
    size, draft_size = model.args.vocab_size, draft_model.args.vocab_size
    if size != draft_size:
        raise UserError(
            f"the draft model has a vocabulary of {draft_size} tokens, the model one of {size}:"
            " they need the same one."
        )
    if draft_tokenizer is not None and tokenizer.get_vocab() != draft_tokenizer.get_vocab():
        raise UserError("the draft model's vocabulary has other tokens than the model's.")
