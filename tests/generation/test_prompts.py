"""Prompts: texts as they are, checked token ids, and chat messages in the chat template."""

from __future__ import annotations

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest

from mlx_rgemma import batch_generate, generate, load, stream_generate
from mlx_rgemma.errors import UserError
from mlx_rgemma.generation.prompts import encode, template_options
from mlx_rgemma.io.hub import EMBEDDED

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<model>{% endif %}"
)
USER = {"role": "user", "content": "A cat"}


@pytest.fixture(scope="module")
def embedded():
    return load()


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """The embedded model with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(EMBEDDED, folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": TEMPLATE}))
    return load(folder)


def test_messages_go_through_the_chat_template(chat):
    model, tokenizer = chat
    text = f"{tokenizer.bos_token}<user>A cat</><model>"
    expected = generate(model, tokenizer, text, max_tokens=8)
    ids = tokenizer.apply_chat_template([USER], add_generation_prompt=True)
    assert encode(tokenizer, text, 2048).tolist() == list(ids)  # one BOS
    assert generate(model, tokenizer, [USER], max_tokens=8) == expected
    assert generate(model, tokenizer, (USER,), max_tokens=8) == expected
    pieces = stream_generate(model, tokenizer, [USER], max_tokens=8)
    assert "".join(piece.text for piece in pieces) == expected
    two = [USER, {"role": "assistant", "content": "sat."}, {"role": "user", "content": "Why?"}]
    batch = batch_generate(model, tokenizer, [[USER], two, "A cat"], max_tokens=8)
    alone = [generate(model, tokenizer, p, max_tokens=8) for p in ([USER], two, "A cat")]
    assert batch.texts == alone
    assert alone[0] == expected


def test_a_text_gets_no_template(chat, embedded):
    found = generate(*chat, "A cat", max_tokens=8)
    assert found == generate(*embedded, "A cat", max_tokens=8)
    assert found != generate(*chat, [USER], max_tokens=8)


def test_an_answer_that_has_begun_is_continued(chat):
    model, tokenizer = chat
    begun = [USER, {"role": "assistant", "content": "The cat"}]
    text = f"{tokenizer.bos_token}<user>A cat</><assistant>The cat"
    expected = generate(model, tokenizer, text, max_tokens=8)
    assert generate(model, tokenizer, begun, max_tokens=8) == expected


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (USER, "a single chat message: put it in a list"),
        ([USER, "hello"], "message 1 is 'hello', expected 'role' and 'content'"),
        ([{"content": "x"}], "message 0: 'role' is missing, expected a text"),
        ([{"role": "user"}], "message 0: 'content' is missing, expected a text"),
        ([{"role": "user", "content": None}], "'content' is None"),
        ([{"role": "user", "content": [{"type": "image"}]}], "'content' is .* expected a text"),
        ([{"role": "user", "content": ["x" * 100_000]}], "'content' is "),
        ([{"role": "system", "content": "Be brief"}, USER], "System role not supported"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_malformed_messages(chat, prompt, message):
    with pytest.raises(UserError, match=message) as error:
        generate(*chat, prompt, max_tokens=2)
    assert len(str(error.value)) < 300


def test_messages_without_a_template(embedded):
    with pytest.raises(UserError, match="no chat template: give a text"):
        generate(*embedded, [USER], max_tokens=2)


@pytest.mark.parametrize("prompts", ["A cat", [USER], [USER, USER]], ids=str)
def test_one_prompt_is_no_batch(chat, prompts):
    with pytest.raises(UserError, match="prompts is a single prompt: put it in a list"):
        batch_generate(*chat, prompts, max_tokens=2)


@pytest.mark.parametrize("make", [list, tuple, np.array, mx.array], ids=lambda m: m.__name__)
def test_token_ids_of_any_kind(embedded, make):
    _, tokenizer = embedded
    assert encode(tokenizer, make([5, 6, 7]), 2048).tolist() == [5, 6, 7]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "the prompt is None: expected a text, token ids"),
        (5, "the prompt is 5: expected"),
        ([5, "six"], "element 1 is 'six': expected"),
        ([5, USER], "element 1 is {'role'"),
        ([1.5], "element 0 is 1.5"),
        ([True], "element 0 is True"),
        ([[1, 2]], r"element 0 is \[1, 2\]"),
        ([2**40], "token 1099511627776; the model knows 0 to 2047"),
        ([10**5000], "token an? int too large"),
        ([-1], "token -1"),
        ([], "the prompt is empty"),
        (np.array([[1, 2]]), "element 0 is array"),
        (mx.array([[1, 2]]), r"an array of shape \(1, 2\), mlx.core.int32: expected"),
        (mx.array([1.0]), r"an array of shape \(1,\), mlx.core.float32"),
        (mx.array(5), r"an array of shape \(\)"),
    ],
    ids=lambda value: repr(value)[:20] if not isinstance(value, list) else str(len(value)),
)
def test_what_is_no_prompt(embedded, prompt, message):
    with pytest.raises(UserError, match=message) as error:
        generate(*embedded, prompt, max_tokens=2)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("config", "message"),
    [("{", "is not JSON"), ("[1]", "must be a JSON object"), ("[" * 100_000, "too deeply")],
    ids=lambda value: value[:10],
)
def test_template_options_that_are_no_object(config, message):
    with pytest.raises(UserError, match=message):
        template_options(config)
