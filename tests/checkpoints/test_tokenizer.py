"""Tokenizers against SentencePiece itself, and what mlx-lm needs of them."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import sentencepiece
from helpers.checkpoint_files import GEMMA_LIKE, STORIES, edit_json, train_sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_rgemma.errors import CheckpointError
from mlx_rgemma.io.hub import EMBEDDED
from mlx_rgemma.tokenizers.load import load_tokenizer

KINDS = {
    "gemma": GEMMA_LIKE,
    "turns as control": {
        **GEMMA_LIKE,
        "user_defined_symbols": ["\n"],
        "control_symbols": ["<start_of_turn>", "<end_of_turn>"],
    },
    "space before the text": {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "user_defined_symbols": ["\n"],
    },
    "space and bytes": {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "byte_fallback": True,
    },
    "normalizing": {},
    "unigram": {"model_type": "unigram", "normalization_rule_name": "identity"},
}

PIECES = [
    *(word for story in STORIES[:3] for word in story.split(" ")),
    *[
        "",
        " ",
        "  ",
        "   ",
        "\n",
        "\n\n",
        "\n\n\n\n\n\n\n",
        "\t",
        "\t\t",
        "\r\n",
        "a",
        "1",
        "2024",
        "3.5",
    ],
    *[
        "é",
        "ü",
        "漢",
        "かな",
        "привет",
        "😀",
        "e\u0301",
        "\u200b",
        "▁",
        "<",
        ">",
        "</b>",
        "<table>",
        "<tab",
    ],
]
TURNS = ["<start_of_turn>", "<end_of_turn>"]


@pytest.fixture(scope="session", params=KINDS)
def bare(request, tmp_path_factory):
    """A folder with nothing but a tokenizer.model, and how that was made."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_sentencepiece(folder / "tokenizer.model", **KINDS[request.param])
    return request.param, folder


@pytest.fixture(scope="session")
def gemma(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma") / "some-model-it"
    folder.mkdir()
    train_sentencepiece(folder / "tokenizer.model", **GEMMA_LIKE)
    return folder


def reference(folder):
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def random_texts(seed: int, count: int):
    rng = random.Random(seed)
    for _ in range(count):
        pieces = rng.choices(PIECES, k=rng.randrange(12))
        yield rng.choice(["", " "]).join(pieces)


def test_agrees_with_sentencepiece(bare):
    kind, folder = bare
    expected, tokenizer = reference(folder), load_tokenizer(folder)
    assert len(tokenizer) == expected.vocab_size()
    for text in random_texts(1, 600):
        ids = expected.encode(text)
        assert tokenizer.encode(text) == [expected.bos_id(), *ids], (kind, text)
        if expected.unk_id() not in ids and (kind == "gemma" or "▁" not in text):
            assert tokenizer.decode(ids) == expected.decode(ids), (kind, text)


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=40))
def test_gemma_on_any_text(gemma, text):
    tokenizer, expected = loaded(gemma)
    ids = expected.encode(text)
    assert tokenizer.encode(text, add_special_tokens=False) == ids
    assert tokenizer.decode(ids) == expected.decode(ids) == text.replace("▁", " ")


_LOADED: dict = {}


def loaded(folder):
    if folder not in _LOADED:
        _LOADED[folder] = load_tokenizer(folder), reference(folder)
    return _LOADED[folder]


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet=st.characters(max_codepoint=0x7F), max_size=60))
def test_embedded_on_any_ascii_text(text):
    tokenizer, expected = loaded(EMBEDDED)
    if "<" in text:  # tokenizers read the special tokens in a text, SentencePiece does not
        text = text.replace("<", "")
    assert tokenizer.encode(text) == [2, *expected.encode(text)]


def test_streaming(gemma):
    """The fast detokenizer, chosen by mlx-lm, gives the same text piece by piece."""
    from mlx_lm.tokenizer_utils import SPMStreamingDetokenizer

    tokenizer, expected = loaded(gemma)
    for text in random_texts(2, 200):
        detokenizer = tokenizer.detokenizer
        assert isinstance(detokenizer, SPMStreamingDetokenizer)
        pieces = []
        for token in expected.encode(text):
            detokenizer.add_token(token)
            pieces.append(detokenizer.last_segment)
        detokenizer.finalize()
        assert "".join([*pieces, detokenizer.last_segment]) == text.replace("▁", " ")


def test_chat_template(gemma):
    tokenizer, _ = loaded(gemma)
    messages = [
        {"role": "user", "content": " Hello? "},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Who are you?"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<bos><start_of_turn>user\nHello?<end_of_turn>\n<start_of_turn>model\nHi.<end_of_turn>\n"
        "<start_of_turn>user\nWho are you?<end_of_turn>\n<start_of_turn>model\n"
    )
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids.count(tokenizer.convert_tokens_to_ids("<start_of_turn>")) == 4


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([{"role": "system", "content": "x"}], "no system role"),
        ([{"role": "assistant", "content": "x"}], "take turns"),
        ([{"role": "user", "content": "x"}] * 2, "take turns"),
    ],
    ids=["system", "assistant first", "twice the user"],
)
def test_chat_template_refuses(gemma, messages, complaint):
    with pytest.raises(Exception, match=complaint):
        loaded(gemma)[0].apply_chat_template(messages)


def test_stops(gemma):
    tokenizer = load_tokenizer(gemma, (1,))
    end_of_turn = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert tokenizer.eos_token_ids == {1, end_of_turn}
    assert load_tokenizer(EMBEDDED, (1, 7)).eos_token_ids == {1, 7}


@pytest.mark.parametrize(
    ("name", "chat"),
    [
        ("recurrentgemma-2b", False),
        ("recurrentgemma-9b", False),
        ("2b", False),
        ("recurrentgemma-2b-it", True),
        ("2b-it", True),
        ("my-model", True),
    ],
)
def test_base_models_do_not_chat(gemma, name, chat):
    assert load_tokenizer(gemma, name=name).has_chat_template is chat


def test_no_turns_no_chat():
    assert not load_tokenizer(EMBEDDED).has_chat_template


def test_translation_is_the_same_as_its_file(gemma, tmp_path):
    """What the converter writes tokenizes as what it was made from."""
    from mlx_rgemma.tokenizers.load import write_converted

    write_converted(gemma, tmp_path, name="some-model-it")
    assert {f.name for f in tmp_path.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    saved, direct = load_tokenizer(tmp_path), loaded(gemma)[0]
    for text in random_texts(3, 100):
        assert saved.encode(text) == direct.encode(text)
    assert saved.chat_template == direct.chat_template


def test_config_of_the_publisher_counts(gemma, tmp_path):
    shutil.copyfile(gemma / "tokenizer.model", tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "GemmaTokenizer", "add_bos_token": true, "chat_template": "{{ 1 }}"}'
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a")[0] == tokenizer.bos_token_id
    assert tokenizer.chat_template == "{{ 1 }}"


@pytest.mark.parametrize("says", [None, False, True])
def test_bos_is_added_where_the_files_forget(tmp_path, says):
    shutil.copytree(EMBEDDED, tmp_path, dirs_exist_ok=True)
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**values, "post_processor": None}))
    edit_json(tmp_path / "tokenizer_config.json", add_bos_token=says)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a cat")[0] == 2
    assert tokenizer.encode("a cat").count(2) == 1
    assert tokenizer.encode("a cat", add_special_tokens=False)[0] != 2


BROKEN = {
    "no tokenizer": ({}, "no tokenizer: neither tokenizer.json nor tokenizer.model"),
    "json truncated": ({"tokenizer.json": b'{"version": '}, "tokenizer.json: not a tokenizer"),
    "json of something": ({"tokenizer.json": b"{}"}, "tokenizer.json: not a tokenizer"),
    "empty model": ({"tokenizer.model": b""}, "tokenizer.model: not a SentencePiece model"),
    "no model": ({"tokenizer.model": b"hello there"}, "tokenizer.model: not a SentencePiece"),
}


@pytest.mark.parametrize(("files", "message"), BROKEN.values(), ids=BROKEN)
def test_broken(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_truncated_model(gemma, tmp_path):
    content = (gemma / "tokenizer.model").read_bytes()
    for length in (1, 100, len(content) // 2, len(content) - 1):
        (tmp_path / "tokenizer.model").write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"tokenizer\.model: "):
            load_tokenizer(tmp_path)


def test_broken_tokenizer_config(tmp_path):
    shutil.copytree(EMBEDDED, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: not valid JSON"):
        load_tokenizer(tmp_path)


PIECES_NO_ONE_MADE = {
    "not UTF-8": (b"\xff\xfe", r"piece 7 is b'\\xff\\xfe'"),
    "empty": (b"", "piece 7 is ''"),
    "long": (b"a" * 1_000_000, "piece 7 is 'aaaa"),
}


@pytest.mark.parametrize(("piece", "message"), PIECES_NO_ONE_MADE.values(), ids=PIECES_NO_ONE_MADE)
def test_damaged_pieces(gemma, tmp_path, piece, message):
    """Protobuf hands out a text that is not UTF-8 as bytes."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((gemma / "tokenizer.model").read_bytes())
    entry = proto.pieces[7]
    entry.piece = "\0" * len(piece)
    sound = entry.SerializeToString()
    damaged = sound.replace(b"\0" * len(piece), piece, 1) if piece else sound
    content = proto.SerializeToString()
    assert sound in content
    (tmp_path / "tokenizer.model").write_bytes(content.replace(sound, damaged, 1))
    with pytest.raises(CheckpointError, match=message) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < len(str(tmp_path)) + 250


def test_many_pieces(tmp_path, monkeypatch):
    from mlx_rgemma.tokenizers import sentencepiece as module

    monkeypatch.setattr(module, "MAX_PIECES", 100)
    shutil.copyfile(EMBEDDED / "tokenizer.model", tmp_path / "tokenizer.model")
    with pytest.raises(CheckpointError, match=r"pieces, expected up to 100\."):
        load_tokenizer(tmp_path)
    with (tmp_path / "tokenizer.model").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match="expected at most 16,000,000"):
        load_tokenizer(tmp_path)
