"""Sampling options as keywords: mlx-lm's names, checked, and visible in each signature."""

from __future__ import annotations

import inspect
import math
from dataclasses import fields

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from mlx_rgemma import batch_generate, generate, load, stream_generate
from mlx_rgemma.errors import UserError
from mlx_rgemma.generation.options import BOUNDS, SamplingOptions
from mlx_rgemma.generation.sampling import Sampler

PROMPT = "Once upon a time"
FUNCTIONS = (generate, stream_generate, batch_generate)


@pytest.fixture(scope="module")
def embedded():
    return load()


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_every_option_is_in_the_signature(function):
    """With the same default; nothing is hidden in **kwargs."""
    parameters = inspect.signature(function).parameters
    for field in fields(SamplingOptions):
        assert parameters[field.name].default == field.default, field.name
        assert parameters[field.name].annotation == field.type
    assert {"sampler", "logits_processors", "stop", "max_tokens"} <= set(parameters)
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def test_the_names_are_mlx_lms():
    theirs = {
        **inspect.signature(make_sampler).parameters,
        **inspect.signature(make_logits_processors).parameters,
    }
    ours = {field.name for field in fields(SamplingOptions)}
    assert ours - {"seed"} == set(theirs) - {"xtc_special_tokens"}


def test_generate_takes_what_stream_generate_takes():
    ours, theirs = (inspect.signature(f).parameters for f in (generate, stream_generate))
    assert set(ours) - {"verbose"} == set(theirs)
    assert all(ours[name].default == theirs[name].default for name in theirs)


SAMPLERS = {
    "temp": {"temp": 0.8},
    "top_p": {"temp": 1.2, "top_p": 0.9},
    "min_p": {"temp": 1.0, "min_p": 0.2, "min_tokens_to_keep": 3},
    "top_k": {"temp": 1.5, "top_k": 4},
}


@pytest.mark.parametrize("options", SAMPLERS.values(), ids=SAMPLERS)
def test_keywords_are_mlx_lms_sampler(embedded, options):
    model, tokenizer = embedded
    mx.random.seed(7)
    sampler = make_sampler(**options)
    expected = generate(model, tokenizer, PROMPT, max_tokens=20, sampler=sampler)
    found = generate(model, tokenizer, PROMPT, max_tokens=20, seed=7, **options)
    assert found == expected != generate(model, tokenizer, PROMPT, max_tokens=20)
    pieces = stream_generate(model, tokenizer, PROMPT, 20, seed=7, **options)
    assert "".join(piece.text for piece in pieces) == expected


def test_xtc_spares_the_end_of_a_text_and_of_a_line(embedded):
    model, tokenizer = embedded
    kept = [*tokenizer.encode("\n", add_special_tokens=False), *tokenizer.eos_token_ids]
    assert len(kept) >= 2
    options = {"temp": 1.0, "xtc_probability": 1.0, "xtc_threshold": 0.05}
    mx.random.seed(3)
    sampler = make_sampler(**options, xtc_special_tokens=kept)
    expected = generate(model, tokenizer, PROMPT, max_tokens=20, sampler=sampler)
    found = generate(model, tokenizer, PROMPT, max_tokens=20, seed=3, **options)
    assert found == expected != generate(model, tokenizer, PROMPT, max_tokens=20, temp=1.0, seed=3)


def test_penalties_and_bias_are_mlx_lms_processors(embedded):
    model, tokenizer = embedded
    plain = generate(model, tokenizer, PROMPT, max_tokens=30)
    for options in (
        {"repetition_penalty": 1.5, "repetition_context_size": 10},
        {"presence_penalty": 3.0},
        {"frequency_penalty": 3.0, "frequency_context_size": 30},
        {"logit_bias": {30: 50.0}},
    ):
        processors = make_logits_processors(**options)
        expected = generate(model, tokenizer, PROMPT, max_tokens=30, logits_processors=processors)
        found = generate(model, tokenizer, PROMPT, max_tokens=30, **options)
        assert found == expected != plain
    # The caller's own come after them.
    seen = []

    def look(tokens, logits):
        seen.append(float(logits[0, 30].item()))
        return logits

    generate(
        model,
        tokenizer,
        PROMPT,
        max_tokens=2,
        logit_bias={30: 1000.0},
        logits_processors=[look],
    )
    assert min(seen) > 900


def test_batches_take_the_same_keywords(embedded):
    model, tokenizer = embedded
    prompts = [PROMPT, "The king"]
    plain = batch_generate(model, tokenizer, prompts, max_tokens=12).texts
    one = batch_generate(model, tokenizer, prompts, max_tokens=12, temp=1.0, seed=4).texts
    assert one == batch_generate(model, tokenizer, prompts, 12, temp=1.0, seed=4).texts != plain
    assert one != batch_generate(model, tokenizer, prompts, 12, temp=1.0, seed=5).texts
    assert plain == batch_generate(model, tokenizer, prompts, 12, temp=1.0, top_k=1).texts
    penalized = batch_generate(model, tokenizer, prompts, 12, repetition_penalty=2.0).texts
    assert penalized == [
        generate(model, tokenizer, prompt, max_tokens=12, repetition_penalty=2.0)
        for prompt in prompts
    ]


def test_extreme_values_that_are_allowed_still_choose_tokens(embedded):
    model, tokenizer = embedded
    plain = generate(model, tokenizer, PROMPT, max_tokens=8)
    assert generate(model, tokenizer, PROMPT, max_tokens=8, temp=1e-300) == plain
    assert generate(model, tokenizer, PROMPT, max_tokens=8, temp=1e-6) == plain
    for options in (
        {"temp": 1.0, "top_k": 2**31 - 1},
        {"temp": 1.0, "top_k": model.args.vocab_size},
        {"temp": 1.0, "min_p": 0.1, "min_tokens_to_keep": 2**31 - 1},
        {"temp": 1000.0, "top_p": 0.5},
    ):
        assert generate(model, tokenizer, PROMPT, max_tokens=4, seed=2**64 - 1, **options)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("wrong", "meant"), [("max_token", "max_tokens"), ("temperature", "temp"), ("topk", "top_k")]
)
def test_a_misspelt_keyword_names_the_function_and_what_was_meant(embedded, function, wrong, meant):
    model, tokenizer = embedded
    prompt = [PROMPT] if function is batch_generate else PROMPT
    with pytest.raises(TypeError) as error:
        function(model, tokenizer, prompt, **{wrong: 3})
    message = str(error.value)
    assert message.startswith(f"{function.__name__}() got an unexpected keyword argument '{wrong}'")
    assert message.endswith(f"did you mean '{meant}'?")


def test_an_unknown_keyword(embedded):
    with pytest.raises(TypeError, match=r"generate\(\) got an .* 'zzz'; see help\(\)"):
        generate(*embedded, PROMPT, zzz=1)


@pytest.mark.parametrize("name", ["temp", "top_p", "top_k", "xtc_probability"])
def test_a_sampler_and_its_options_are_one_too_many(embedded, name):
    model, tokenizer = embedded
    value = {"top_k": 3, "top_p": 0.3}.get(name, 0.5)
    for function, prompt in ((generate, PROMPT), (batch_generate, [PROMPT])):
        with pytest.raises(UserError, match=f"sampler and {name} were both given"):
            function(model, tokenizer, prompt, sampler=make_sampler(1.0), **{name: value})


TOO_LONG = 10**5000
BAD = [
    *[(name, math.nan) for name in BOUNDS if "context" not in name],
    *[(name, high * 10 if high > 1 else 2) for name, (_, high) in BOUNDS.items()],
    *[(name, low - 1) for name, (low, _) in BOUNDS.items()],
    *[(name, "0.5") for name in BOUNDS],
    ("temp", math.inf),
    ("temp", True),
    ("top_k", 2.5),
    ("seed", TOO_LONG),
    ("prefill_step_size", 0),
    ("max_tokens", 2.5),
    ("max_tokens", "3"),
]


@pytest.mark.parametrize(
    ("name", "value"), BAD, ids=lambda value: "huge" if value == TOO_LONG else str(value)
)
def test_values_out_of_bounds(embedded, name, value):
    model, tokenizer = embedded
    with pytest.raises(UserError, match=f"^{name} is .*, expected ") as error:
        generate(model, tokenizer, PROMPT, **{"max_tokens": 2, name: value})
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("bias", [{-1: 1.0}, {2048: 1.0}, {"a": 1.0}, {5: math.nan}, {5: "x"}])
def test_a_bias_of_what_is_no_token(embedded, bias):
    with pytest.raises(UserError, match=r"^logit_bias.* expected a"):
        generate(*embedded, PROMPT, max_tokens=2, logit_bias=bias)


def test_numpy_numbers_are_numbers(embedded):
    model, tokenizer = embedded
    found = generate(
        model, tokenizer, PROMPT, max_tokens=5, temp=np.float32(0.5), top_k=np.int64(3), seed=1
    )
    assert found == generate(model, tokenizer, PROMPT, max_tokens=5, temp=0.5, top_k=3, seed=1)


def test_speculation_gets_a_sampler_with_a_distribution(embedded):
    _, tokenizer = embedded
    options = SamplingOptions(temp=0.7, top_p=0.9)
    sampler, _ = options.functions(tokenizer, 2048, speculative=True)
    assert isinstance(sampler, Sampler) and sampler.temp == 0.7 and sampler.top_p == 0.9
    excluding = SamplingOptions(temp=0.7, xtc_probability=0.5)  # which it does not know
    assert not isinstance(excluding.functions(tokenizer, 2048, speculative=True)[0], Sampler)
