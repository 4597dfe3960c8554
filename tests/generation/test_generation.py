"""Generating: the loop, stop texts, processors, batches, and memory that does not grow."""

from __future__ import annotations

from dataclasses import fields

import mlx.core as mx
import numpy as np
import pytest
from helpers.models import golden, golden_model

from mlx_rgemma import batch_generate, generate, load, stream_generate
from mlx_rgemma.errors import UserError
from mlx_rgemma.generation.prompts import encode
from mlx_rgemma.generation.response import GenerationResponse
from mlx_rgemma.tokenizers.detokenizer import TEXT_LIMIT, StopSequences, StreamingDetokenizer


@pytest.fixture(scope="module")
def embedded():
    return load()


PROMPTS = ["Once upon a time", "The", "A little dog named Max went to the park and", "x"]


def test_the_embedded_model_writes_english(embedded):
    model, tokenizer = embedded
    text = generate(model, tokenizer, "Once upon a time", max_tokens=60)
    words = text.lower().split()
    assert len(words) > 30
    common = {"a", "the", "to", "and", "was", "there", "she", "he", "her", "in", "they"}
    assert sum(word.strip(".,!?") in common for word in words) > len(words) / 5


def test_streaming_gives_the_same_text(embedded):
    model, tokenizer = embedded
    responses = list(stream_generate(model, tokenizer, "The king", max_tokens=30))
    text = "".join(r.text for r in responses)
    assert text == generate(model, tokenizer, "The king", max_tokens=30)
    assert [r.generation_tokens for r in responses] == list(range(1, len(responses) + 1))
    assert [r.finish_reason for r in responses[:-1]] == [None] * (len(responses) - 1)
    assert responses[-1].finish_reason == "length"
    assert responses[-1].prompt_tokens == len(encode(tokenizer, "The king", 2048))


def test_a_response_has_mlx_lms_fields():
    from mlx_lm.generate import GenerationResponse as MlxLmResponse

    ours, theirs = (
        {(f.name, f.default) for f in fields(kind)} for kind in (GenerationResponse, MlxLmResponse)
    )
    assert ours == theirs


def test_greedy_is_the_golden_continuation(model_name, embedded):
    model = golden_model(model_name)
    data = golden(f"greedy/{model_name}.npz")
    _, tokenizer = embedded
    for prompt, expected in zip(data["prompts"], data["generated"], strict=True):
        responses = stream_generate(
            model, tokenizer, prompt.tolist(), max_tokens=len(expected), prefill_step_size=5
        )
        tokens = [r.token for r in responses]
        ended = next((i for i, t in enumerate(expected) if t == 1), len(expected) - 1)
        assert tokens == expected[: ended + 1].tolist()


@pytest.mark.parametrize("chunk", [1, 2, 7, 100])
def test_prompt_chunks_do_not_matter(embedded, chunk):
    model, tokenizer = embedded
    prompt = "Tom and Lily were friends. " * 8
    expected = generate(model, tokenizer, prompt, max_tokens=12)
    assert expected == generate(model, tokenizer, prompt, max_tokens=12, prefill_step_size=chunk)


def test_stop_text_ends_the_generation(embedded):
    model, tokenizer = embedded
    plain = generate(model, tokenizer, "Once upon a time", max_tokens=60)
    stop = plain[20:26]
    responses = list(
        stream_generate(model, tokenizer, "Once upon a time", max_tokens=60, stop=stop)
    )
    assert "".join(r.text for r in responses) == plain[: plain.index(stop)]
    assert responses[-1].finish_reason == "stop"
    never = generate(
        model, tokenizer, "Once upon a time", max_tokens=60, stop=["@@", stop[:3] + "@"]
    )
    assert never == plain


@pytest.mark.parametrize("cut", range(1, 9))
def test_stop_texts_are_found_across_pieces(cut):
    text, stop = "one two stop three", "stop"
    matcher, shown, stopped = StopSequences([stop, "zzz"]), "", False
    for at in range(0, len(text), cut):
        piece, stopped = matcher.feed(text[at : at + cut], last=False)
        shown += piece
        if stopped:
            break
    assert (shown, stopped) == ("one two ", True)


def test_what_was_held_back_comes_at_the_end():
    matcher = StopSequences(["stop"])
    assert matcher.feed("a st", last=False) == ("a ", False)
    assert matcher.feed("o", last=True) == ("sto", False)


def test_repetition_penalty_is_mlx_lms(embedded):
    """The bounded context gives what mlx-lm's unbounded one gives.

    One prompt token a chunk: mlx-lm before 0.32 shows processors the prompt's last chunk only.
    """
    from mlx_lm.generate import generate_step
    from mlx_lm.sample_utils import make_logits_processors

    model, tokenizer = embedded
    tokens = encode(tokenizer, "The", 2048)[:1]
    processors = make_logits_processors(repetition_penalty=1.5, repetition_context_size=30)
    steps = generate_step(tokens, model, max_tokens=40, logits_processors=processors)
    expected = [token for token, _ in steps]
    plain = [r.token for r in stream_generate(model, tokenizer, tokens, max_tokens=40)]
    found = [
        r.token
        for r in stream_generate(
            model, tokenizer, tokens, max_tokens=40, logits_processors=processors
        )
    ]
    assert found == expected[: len(found)]
    assert found != plain


def test_sampling_is_seeded(embedded):
    from mlx_lm.sample_utils import make_sampler

    model, tokenizer = embedded

    def sample(seed: int, **options) -> str:
        mx.random.seed(seed)
        sampler = make_sampler(**{"temp": 1.0, **options})
        return generate(model, tokenizer, "The", max_tokens=20, sampler=sampler)

    assert sample(1) == sample(1) != sample(2)
    assert sample(1, top_k=1) == generate(model, tokenizer, "The", max_tokens=20)
    for options in ({"top_p": 0.5}, {"min_p": 0.1}, {"top_k": 5}):
        assert sample(3, **options) == sample(3, **options)


def test_batches_are_what_each_is_alone(embedded):
    model, tokenizer = embedded
    alone = [generate(model, tokenizer, p, max_tokens=25) for p in PROMPTS]
    result = batch_generate(model, tokenizer, PROMPTS, max_tokens=25)
    assert result.texts == alone
    assert result.finish_reasons == ["length"] * len(PROMPTS)
    few = batch_generate(
        model, tokenizer, PROMPTS, max_tokens=25, completion_batch_size=2, prefill_batch_size=2
    )
    assert few.texts == alone


def test_batches_with_limits_and_stop_texts(embedded):
    model, tokenizer = embedded
    limits = [3, 20, 7, 12]
    alone = [
        generate(model, tokenizer, p, max_tokens=n, stop=" the")
        for p, n in zip(PROMPTS, limits, strict=True)
    ]
    result = batch_generate(
        model, tokenizer, PROMPTS, max_tokens=limits, stop=" the", return_prompt_caches=True
    )
    assert result.texts == alone
    assert len(result.caches) == len(PROMPTS)
    assert all(len(cache) == len(model.layers) for cache in result.caches)


@pytest.mark.parametrize("step", [3, 2048])
def test_mlx_lms_batch_generator_on_long_unequal_prompts(model_name, step):
    """Prompts shorter and longer than the window, and than the convolution's memory."""
    from mlx_lm.generate import BatchGenerator, generate_step

    model = golden_model(model_name)
    window = model.args.attention_window_size
    rng = np.random.default_rng(11)
    lengths = [1, 2, 3, 4, window, window + 1, 3 * window]
    prompts = [rng.integers(3, 90, n).tolist() for n in lengths]
    expected = {}
    for i, prompt in enumerate(prompts):
        steps = generate_step(mx.array(prompt), model, max_tokens=2 * window)
        expected[i] = [token for token, _ in steps]
    generator = BatchGenerator(model, max_tokens=2 * window, prefill_step_size=step)
    found: dict[int, list[int]] = {uid: [] for uid in generator.insert(prompts)}
    while responses := generator.next_generated():
        for response in responses:
            found[response.uid].append(response.token)
    generator.close()
    assert found == expected


def test_a_state_is_continued(embedded):
    model, tokenizer = embedded
    text = "Once upon a time there was a little girl."
    tokens = encode(tokenizer, text, 2048).tolist()
    expected = generate(model, tokenizer, tokens, max_tokens=20)
    cache = model.make_cache()
    model(mx.array([tokens[:6]]), cache=cache)
    assert generate(model, tokenizer, tokens[6:], max_tokens=20, prompt_cache=cache) == expected


def test_generating_keeps_neither_text_nor_tokens(embedded):
    """No Python list and no array grows with the number of tokens."""
    _, tokenizer = embedded
    stream = StreamingDetokenizer(tokenizer)
    ids = tokenizer.encode("The little girl was very happy.\n", add_special_tokens=False)
    expected, found = tokenizer.decode(ids * 2000), ""
    longest = 0
    for token in ids * 2000:
        found += stream.add(token)
        longest = max(longest, len(stream.detokenizer.text), len(stream.detokenizer.tokens))
    found += stream.finish()
    assert found.strip() == expected.strip()
    assert longest <= TEXT_LIMIT + 64


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([5, 2048], {}, "token 2048"),
        ([-1], {}, "token -1"),
        ("hi", {"max_tokens": 0}, "max_tokens is 0"),
        ("hi", {"max_tokens": -2}, "max_tokens is -2"),
    ],
    ids=str,
)
def test_wrong_arguments(embedded, prompt, options, message):
    model, tokenizer = embedded
    with pytest.raises(UserError, match=message):
        generate(model, tokenizer, prompt, **options)


def test_wrong_batches(embedded):
    model, tokenizer = embedded
    for prompts, options, message in (
        ([], {}, "no prompts"),
        (["a", []], {}, "empty"),
        (["a"], {"max_tokens": 0}, "max_tokens"),
        (["a", "b"], {"max_tokens": [3]}, "for each prompt"),
    ):
        with pytest.raises(UserError, match=message):
            batch_generate(model, tokenizer, prompts, **options)
