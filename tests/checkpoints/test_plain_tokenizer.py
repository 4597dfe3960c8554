"""A plain tokenizer read without transformers: the tokens and texts of mlx-lm's wrapper."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_rgemma import load
from mlx_rgemma.io.hub import EMBEDDED
from mlx_rgemma.io.text import DEFAULT_TEXT
from mlx_rgemma.tokenizers.detokenizer import StreamingDetokenizer
from mlx_rgemma.tokenizers.fast import FastTokenizer, fast_tokenizer
from mlx_rgemma.tokenizers.load import load_tokenizer

EOS = (7,)


def no_wrapper():
    raise AssertionError("the wrapper was asked for")


@pytest.fixture(scope="module")
def plain() -> FastTokenizer:
    return fast_tokenizer(EMBEDDED, EOS, no_wrapper)


@pytest.fixture(scope="module")
def wrapper():
    return load_tokenizer(EMBEDDED, EOS)


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED / name, tmp_path)
    return tmp_path


def change(path: Path, **values) -> None:
    """Set keys of a JSON file; None takes one out."""
    content = {**json.loads(path.read_text("utf-8")), **values}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}), "utf-8")


def test_facts(plain, wrapper):
    assert len(plain) == len(wrapper) == 2048
    assert plain.get_vocab() == wrapper.get_vocab()
    assert plain.get_added_vocab() == wrapper.get_added_vocab()
    assert plain.eos_token_ids == wrapper.eos_token_ids == {1, 7}
    for name in ("bos_token", "bos_token_id", "eos_token", "eos_token_id", "has_chat_template"):
        assert getattr(plain, name) == getattr(wrapper, name), name


@pytest.mark.parametrize(
    "text",
    ["", " ", "a", "  a  b \n\n c", "<s>x</s> y<pad>", " <s> a", "é😀▁x\x00", "<0x41>", "\r\n\t"],
)
def test_tokens(plain, wrapper, text):
    for special in (True, False):
        tokens = plain.encode(text, add_special_tokens=special)
        assert tokens == wrapper.encode(text, add_special_tokens=special)
        assert type(tokens) is list
    assert plain.encode(text) == wrapper.encode(text)


def test_tokens_of_a_long_text(plain, wrapper):
    text = DEFAULT_TEXT.read_text("utf-8")
    assert plain.encode(text) == wrapper.encode(text)


def test_tokens_of_any_text(plain, wrapper):
    @given(st.text(st.sampled_from("ab é\n▁<s>/0x4😀"), max_size=30))
    @settings(max_examples=200, deadline=None)
    def same(text):
        assert plain.encode(text) == wrapper.encode(text)

    same()


@pytest.fixture(scope="module")
def with_bytes(tmp_path_factory) -> Path:
    """A tokenizer with a token a byte, whose texts keep their first space."""
    folder = tmp_path_factory.mktemp("bytes")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED / name, folder)
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary |= {f"<0x{n:02X}>": len(vocabulary) + n for n in range(256)}
    decoders = content["decoder"]["decoders"][:-1]
    model = {**content["model"], "byte_fallback": True}
    change(
        folder / "tokenizer.json", model=model, decoder={"type": "Sequence", "decoders": decoders}
    )
    return folder


@pytest.mark.parametrize("strips", [True, False], ids=["strips", "keeps the space"])
def test_texts(plain, wrapper, with_bytes, strips):
    if not strips:
        plain, wrapper = fast_tokenizer(with_bytes, EOS, no_wrapper), load_tokenizer(with_bytes)
        assert len(plain) == len(wrapper) == 2048 + 256
        assert plain.encode("猫") == wrapper.encode("猫")
    rng = np.random.default_rng(0)
    for _ in range(100):
        one, other = StreamingDetokenizer(plain), StreamingDetokenizer(wrapper)
        low = 0 if strips or rng.random() < 0.3 else 2048  # bytes, whole characters among them
        tokens = [int(t) for t in rng.integers(low, len(plain), 30)]
        tokens += plain.encode(" 猫 é", add_special_tokens=False)
        assert [one.add(t) for t in tokens] == [other.add(t) for t in tokens]
        assert one.finish() == other.finish()
        one, other = (
            StreamingDetokenizer(plain, after=tokens[0]),
            StreamingDetokenizer(wrapper, after=tokens[0]),
        )
        assert [one.add(t) for t in tokens[1:]] == [other.add(t) for t in tokens[1:]]


def test_detokenizers_are_apart(plain):
    one, other = plain.detokenizer, plain.detokenizer
    one.add_token(100)
    assert (len(one.tokens), len(other.tokens), other.text) == (1, 0, "")


def test_more_ends_of_a_text(folder, wrapper):
    plain = fast_tokenizer(folder, EOS, no_wrapper)
    for token in ("12", "▁the"):
        plain.add_eos_token(token)
    assert plain.eos_token_ids == {1, 7, 12, wrapper.get_vocab()["▁the"]}
    with pytest.raises(ValueError, match="'no such' is not a token"):
        plain.add_eos_token("no such")


def test_what_it_does_not_know_the_wrapper_does(folder, wrapper):
    asked = []
    plain = fast_tokenizer(folder, EOS, lambda: asked.append(1) or wrapper)
    assert plain.convert_ids_to_tokens([2, 100]) == wrapper.convert_ids_to_tokens([2, 100])
    assert plain.decode(plain.encode("A cat")) == "<s> A cat"
    with pytest.raises(AttributeError, match="nonsense"):
        plain.nonsense  # noqa: B018
    with pytest.raises(AttributeError, match="_private"):
        plain._private  # noqa: B018
    assert asked == [1]


@pytest.mark.parametrize(
    "values",
    [
        {"tokenizer_class": "GemmaTokenizer"},
        {"add_bos_token": False},
        {"add_bos_token": None},
        {"add_eos_token": True},
        {"clean_up_tokenization_spaces": True},
        {"chat_template": "{{ bos_token }}"},
        {"additional_special_tokens": ["<x>"]},
        {"bos_token": "<new>"},
        {"pad_token": None},
        {"eos_token": {"content": "</s>", "lstrip": True}},
    ],
    ids=str,
)
def test_a_configuration_that_says_more_is_the_wrappers(folder, values):
    assert fast_tokenizer(folder, EOS, no_wrapper) is not None
    change(folder / "tokenizer_config.json", **values)
    assert fast_tokenizer(folder, EOS, no_wrapper) is None


@pytest.mark.parametrize(
    "values",
    [
        {"decoder": {"type": "ByteLevel"}},
        {"decoder": None},
        {"post_processor": None},
        {"added_tokens": []},
    ],
    ids=lambda values: next(iter(values)),
)
def test_a_tokenizer_of_another_kind_is_the_wrappers(folder, values):
    change(folder / "tokenizer.json", **values)
    assert fast_tokenizer(folder, EOS, no_wrapper) is None


@pytest.mark.parametrize(
    "name", ["special_tokens_map.json", "added_tokens.json", "chat_template.jinja"]
)
def test_more_files_are_the_wrappers(folder, name):
    (folder / name).write_text("{}")
    assert fast_tokenizer(folder, EOS, no_wrapper) is None


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("damage", ["missing", "[1]", "{}", '{"a', b"\xff\xfe"])
def test_damaged_files_are_left_to_the_wrapper(folder, name, damage):
    path = folder / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    assert fast_tokenizer(folder, EOS, no_wrapper) is None


def test_loading_with_a_plain_tokenizer():
    assert type(load(plain=True)[1]) is FastTokenizer
    assert type(load()[1]).__name__ == "TokenizerWrapper"
