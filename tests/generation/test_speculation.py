"""Speculative decoding: the model's own text and distribution, in fewer passes; exact trims."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import product

import mlx.core as mx
import numpy as np
import pytest
from helpers.assertions import max_error
from helpers.models import golden_model
from helpers.random_models import SMALL

from mlx_rgemma import GriffinConfig, Model, generate, load, stream_generate
from mlx_rgemma.errors import UserError
from mlx_rgemma.generation import speculative as speculation
from mlx_rgemma.generation.draft import PromptLookup
from mlx_rgemma.generation.sampling import Sampler
from mlx_rgemma.generation.speculative import SpeculationStats, speculative_steps
from mlx_rgemma.griffin.cache import state_nbytes

pytestmark = pytest.mark.slow

STATE_ATOL = 1e-4
"""float32 logits behind a state that has read the same tokens in other calls."""


def random_model(vocab_size: int = 97, seed: int = 0, sharpness: float = 1.0) -> Model:
    """A model whose logits are multiplied by `sharpness`."""
    mx.random.seed(seed)
    config = GriffinConfig(vocab_size=vocab_size, attention_window_size=12, **SMALL)
    model = Model(config)
    model.model.embed_tokens.weight = mx.random.normal((vocab_size, 32)) * 0.25
    model.model.final_norm.weight = mx.full((32,), sharpness - 1.0)
    mx.eval(model.parameters())
    return model


def bad_draft_model() -> Model:
    """One that says the opposite of what such a model would."""
    return random_model(sharpness=-1.0)


class EndlessTokenizer:
    """The embedded model's, for tokens of any model, none of which ends the text."""

    eos_token_ids: frozenset[int] = frozenset()
    bos_token = None

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    @property
    def detokenizer(self):
        return self.tokenizer.detokenizer


@pytest.fixture(scope="module")
def embedded():
    return load()


@pytest.fixture(scope="module", params=["tiny-2b", "tiny-9b", "embedded"])
def thousand(request, embedded):
    """A model, a tokenizer, a prompt, and a thousand tokens of plain greedy decoding."""
    model = embedded[0] if request.param == "embedded" else golden_model(request.param)
    tokenizer, prompt = EndlessTokenizer(embedded[1]), [2, 5, 6, 7, 8]
    tokens = [r.token for r in stream_generate(model, tokenizer, prompt, max_tokens=1000)]
    return model, tokenizer, prompt, tokens


@pytest.mark.parametrize(
    ("options", "passes"),
    [({"num_draft_tokens": 4}, 200), ({"prompt_lookup": 5}, 900)],
    ids=["draft model", "prompt lookup"],
)
def test_a_thousand_greedy_tokens_are_the_models_own_in_fewer_passes(thousand, options, passes):
    model, tokenizer, prompt, expected = thousand
    stats = SpeculationStats()
    if "num_draft_tokens" in options:
        options = {**options, "draft_model": model}  # agrees with itself
    responses = list(
        stream_generate(
            model, tokenizer, prompt, max_tokens=1000, speculation_stats=stats, **options
        )
    )
    assert [r.token for r in responses] == expected
    assert stats.tokens == 1000
    assert stats.passes <= passes
    assert stats.passes + stats.accepted == stats.tokens
    assert sum(r.from_draft for r in responses) == stats.accepted
    assert responses[-1].finish_reason == "length"


@pytest.mark.parametrize("n", [1, 3, 11])
def test_a_bad_draft_model_changes_nothing(embedded, n):
    model, tokenizer = golden_model("tiny-2b"), EndlessTokenizer(embedded[1])
    expected = [r.token for r in stream_generate(model, tokenizer, [2, 5], max_tokens=60)]
    stats = SpeculationStats()
    options = {"draft_model": bad_draft_model(), "num_draft_tokens": n, "speculation_stats": stats}
    found = stream_generate(model, tokenizer, [2, 5], max_tokens=60, **options)
    assert [r.token for r in found] == expected
    assert stats.acceptance_rate < 0.2
    assert stats.passes <= 60


@pytest.mark.parametrize("stop", [1, 2, 5, 6, 7])
@pytest.mark.parametrize("drafter", ["own", "bad", "lookup"])
def test_a_state_can_be_continued_wherever_the_generation_was_left(embedded, stop, drafter):
    model, tokenizer = golden_model("tiny-9b"), EndlessTokenizer(embedded[1])
    prompt = [2, 5, 6, 7, 5, 6, 7, 5, 6]
    draft = {"own": model, "bad": bad_draft_model(), "lookup": None}[drafter]
    cache = model.make_cache() + (draft.make_cache() if draft else [])
    options = {"draft_model": draft} if draft else {"prompt_lookup": 4}
    steps = stream_generate(
        model, tokenizer, prompt, prompt_cache=cache, prefill_step_size=4, **options
    )
    tokens = [next(steps).token for _ in range(stop)]
    steps.close()
    reader = [(model, cache[: len(model.layers)])]
    reader += [(draft, cache[len(model.layers) :])] if draft else []
    for reading, state in reader:
        plain = reading.make_cache()
        reading(mx.array([prompt + tokens]), cache=plain)
        assert state[0].positions == plain[0].positions
        assert not any(layer.is_trimmable() for layer in state)
        found, expected = (reading(mx.array([[5]]), cache=c) for c in (state, plain))
        assert max_error(found, np.array(expected)) < STATE_ATOL


@pytest.mark.parametrize("drafter", ["draft model", "prompt lookup"])
def test_memory_does_not_grow(embedded, drafter):
    model, tokenizer = golden_model("tiny-9b"), EndlessTokenizer(embedded[1])
    options = {"prompt_lookup": 3}
    if drafter == "draft model":
        options = {"draft_model": bad_draft_model()}
    held = []
    steps = stream_generate(model, tokenizer, [2, 5, 6], max_tokens=400, **options)
    for response in steps:
        if response.generation_tokens in (100, 396):
            held.append(mx.get_active_memory())
    assert abs(held[1] - held[0]) < 100_000


def test_logits_processors_see_what_they_would_see(embedded):
    from mlx_lm.sample_utils import make_logits_processors

    model, tokenizer = embedded
    processors = make_logits_processors(repetition_penalty=1.4, repetition_context_size=30)
    options = {"max_tokens": 60, "logits_processors": processors}
    expected = generate(model, tokenizer, "The king", **options)
    stats = SpeculationStats()
    drafting = {"draft_model": model, "speculation_stats": stats}
    assert generate(model, tokenizer, "The king", **options, **drafting) == expected
    assert stats.acceptance_rate > 0.9
    assert generate(model, tokenizer, "The king", **options, prompt_lookup=3) == expected


# The distribution of sampled text.

VOCABULARY, PROMPT, LENGTH = 4, [1, 2, 3], 3


def expected_frequencies(model: Model, sampler: Sampler) -> np.ndarray:
    """The probability of every text of `LENGTH` tokens, by reading them all."""
    texts = np.array(list(product(range(VOCABULARY), repeat=LENGTH)))
    tokens = np.concatenate([np.tile(PROMPT, (len(texts), 1)), texts], axis=1)
    logits = model(mx.array(tokens))[:, len(PROMPT) - 1 : -1].reshape(-1, VOCABULARY)
    odds = np.exp(np.array(sampler.distribution(logits - mx.logsumexp(logits, -1, keepdims=True))))
    odds = odds.reshape(len(texts), LENGTH, VOCABULARY)
    return np.take_along_axis(odds, texts[..., None], axis=2)[..., 0].prod(axis=1)


def chi_square(model: Model, runs: int, sampler, expected: np.ndarray, **options) -> float:
    """How many standard deviations the chi-square statistic lies above its mean."""
    counts = np.zeros(VOCABULARY**LENGTH)
    powers = VOCABULARY ** np.arange(LENGTH - 1, -1, -1)
    for _ in range(runs):
        steps = speculative_steps(
            mx.array(PROMPT),
            model,
            prompt_cache=model.make_cache(),
            max_tokens=LENGTH,
            sampler=sampler,
            **options,
        )
        counts[int(np.array([token for token, _, _ in steps]) @ powers)] += 1
    large = expected * runs >= 5
    found = np.append(counts[large], counts[~large].sum())
    wanted = np.append(expected[large], expected[~large].sum()) * runs
    found, wanted = found[wanted > 0], wanted[wanted > 0]
    freedom = len(found) - 1
    assert freedom > 4
    return (((found - wanted) ** 2 / wanted).sum() - freedom) / np.sqrt(2 * freedom)


@pytest.fixture(scope="module")
def pair():
    """Two models that disagree: about half of what the one drafts suits the other."""
    return random_model(VOCABULARY, 1, 0.25), random_model(VOCABULARY, 2, -0.1)


@pytest.mark.parametrize("kind", ["rejection", "any sampler", "prompt lookup"])
def test_sampled_text_has_the_models_distribution(pair, kind):
    from mlx_lm.sample_utils import make_sampler

    model, draft_model = pair
    sampler = Sampler(0.9, top_p=0.95)
    expected = expected_frequencies(model, sampler)
    stats = SpeculationStats()
    options = {"draft_model": draft_model, "num_draft_tokens": 2, "stats": stats}
    if kind == "prompt lookup":
        options = {"prompt_lookup": 2, "stats": stats}
    mx.random.seed(7)
    used = make_sampler(0.9, 0.95) if kind == "any sampler" else sampler
    assert chi_square(model, 400, used, expected, **options) < 4
    if kind != "prompt lookup":
        assert 0.1 < stats.acceptance_rate < 0.95


def test_that_test_finds_drafts_kept_against_the_rule(pair, monkeypatch):
    model, draft_model = pair
    sampler = Sampler(0.9, top_p=0.95)

    def keep_all(draft, logprobs, sampler):
        tokens = draft.tokens.tolist()
        return [*tokens, sampler(logprobs[-1:]).item()], len(tokens)

    monkeypatch.setattr(speculation, "verify", keep_all)
    mx.random.seed(7)
    expected = expected_frequencies(model, sampler)
    options = {"draft_model": draft_model, "num_draft_tokens": 2}
    assert chi_square(model, 150, sampler, expected, **options) > 8


def test_rejection_keeps_more_than_agreement(pair):
    from mlx_lm.sample_utils import make_sampler

    model, draft_model = pair
    rates = []
    for sampler in (Sampler(1.0), make_sampler(1.0)):
        stats = SpeculationStats()
        mx.random.seed(3)
        steps = speculative_steps(
            mx.array(PROMPT),
            model,
            prompt_cache=model.make_cache(),
            draft_model=draft_model,
            max_tokens=300,
            sampler=sampler,
            stats=stats,
        )
        assert len(list(steps)) == 300
        rates.append(stats.acceptance_rate)
    assert rates[0] > rates[1] + 0.05


# Prompt lookup by itself.


def lookup(tokens: list[int], n: int, **options) -> list[int]:
    source = PromptLookup(**options)
    source.read(mx.array(tokens[:-1]))
    return source.draft(tokens[-1], n, lambda logits, drafted: logits).tokens.tolist()


def test_lookup_continues_what_was_there_before():
    assert lookup([1, 2, 3, 4, 5, 6, 9, 2, 3], 3) == [4, 5, 6]
    assert lookup([1, 2, 3, 7, 9, 2, 3, 8, 5, 1, 2, 3], 2) == [7, 9]  # the longer match wins
    assert lookup([7, 1, 2, 1, 2], 5) == [1, 2, 1, 2, 1]  # goes round
    assert lookup([1, 2, 3, 4, 5], 3) == []
    assert lookup([1], 3) == []


def test_lookup_forgets_what_is_far_back():
    source = PromptLookup(window=50)
    rng = np.random.default_rng(0)
    for _ in range(20):
        source.read(mx.array(rng.integers(0, 1000, 97)))
        assert len(source.tokens) <= 100
        assert len(source.index) <= 300
    marker = [2001, 2002, 2003]
    source.read(mx.array([*marker, *range(1000, 1120), *marker[:2]]))
    assert source.draft(marker[2], 2, lambda logits, drafted: logits).tokens.size == 0


# What is refused, and the command.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft_model": random_model(50)}, "vocabulary of 50 tokens, the model one of 97"),
        (
            {"draft_model": random_model(), "prompt_lookup": 2},
            "either a draft model or prompt lookup",
        ),
        ({"draft_model": random_model(), "num_draft_tokens": 0}, "expected at least 1"),
    ],
    ids=["vocabulary", "two drafters", "no tokens"],
)
def test_what_does_not_fit_is_refused(embedded, options, message):
    model, tokenizer = golden_model("tiny-2b"), EndlessTokenizer(embedded[1])
    with pytest.raises(UserError, match=message):
        list(stream_generate(model, tokenizer, [2, 3], **options))


def test_the_state_is_as_large_as_without(embedded):
    model, tokenizer = embedded
    cache = model.make_cache()
    expected = state_nbytes(cache)
    generate(model, tokenizer, "The", max_tokens=20, prompt_cache=cache, prompt_lookup=4)
    assert state_nbytes(cache) == expected


def run_command(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mlx_rgemma.generate", "--max-tokens", "30", *args],
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_command_prints_the_acceptance_rate():
    from mlx_rgemma.io.hub import EMBEDDED

    result = run_command("--draft-model", str(EMBEDDED), "--num-draft-tokens", "4")
    assert result.returncode == 0, result.stderr
    text, numbers = result.stdout.split("=" * 10)[1:]
    assert numbers.splitlines()[-1] == (
        "Speculation: 100.0% of 24 drafted tokens accepted, 6 passes for 30 tokens"
    )
    looked_up = run_command("--prompt-lookup", "3", "--json")
    answer = json.loads(looked_up.stdout)
    assert answer["text"] == text.strip("\n")
    assert 0 <= answer["acceptance_rate"] <= 1
    assert answer["passes"] <= 30


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--draft-model", "nowhere"), "nowhere"),
        (("--prompt-lookup", "2", "-p", "a", "-p", "b"), "go with one prompt"),
        (("--prompt-lookup", "2", "--draft-model", "x"), "without a --draft-model"),
    ],
)
def test_the_command_refuses_in_one_line(args, message):
    result = run_command(*args)
    assert result.returncode == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
