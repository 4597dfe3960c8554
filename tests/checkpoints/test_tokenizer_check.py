"""Tokenizers that would take unbounded time or memory, or stop the process."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from mlx_rgemma.checkpoints.load import load
from mlx_rgemma.errors import CheckpointError
from mlx_rgemma.io.hub import EMBEDDED
from mlx_rgemma.tokenizers.check import backtracks, check_tokenizer_files
from mlx_rgemma.tokenizers.fast import fast_tokenizer
from mlx_rgemma.tokenizers.load import load_tokenizer


@pytest.fixture
def folder(tmp_path):
    target = tmp_path / "model"
    shutil.copytree(EMBEDDED, target)
    return target


def edit(folder, **sections):
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **sections}))


def split(pattern: str) -> dict:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


def replace(content: str) -> dict:
    return {"type": "Replace", "pattern": {"String": "a"}, "content": content}


def sequence(*steps: dict, kind: str = "normalizers") -> dict:
    return {"type": "Sequence", kind: list(steps)}


HOSTILE = {
    "repeated repetition": ({"pre_tokenizer": split("(a+)+$")}, r"expression '\(a\+\)\+\$', which"),
    "in a sequence": (
        {"pre_tokenizer": sequence(split("x"), split("(a|a)*$"), kind="pretokenizers")},
        "pre_tokenizer has the regular expression",
    ),
    "in the decoder": (
        {"decoder": {"type": "Replace", "pattern": {"Regex": "(a*)*$"}, "content": ""}},
        "decoder has the regular expression",
    ),
    "long": ({"pre_tokenizer": split("a" * 1_000_000)}, "expression 'aaaa"),
    "growth": ({"normalizer": sequence(*[replace("a" * 10)] * 12)}, "a text too long"),
    "prepended": (
        {"normalizer": {"type": "Prepend", "prepend": "a" * 10_000_000}},
        "a text too long",
    ),
    "added tokens": (
        {"added_tokens": [{"id": n, "content": f"<{n}>", "special": True} for n in range(60_000)]},
        "60,000 added tokens, expected up to 50,000",
    ),
    "steps": ({"normalizer": sequence(*[replace("b")] * 1000)}, "more than 100 steps"),
    "character map": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "A" * 2_000_000}},
        "a precompiled_charsmap of 2,000,000 bytes",
    ),
}


@pytest.mark.parametrize(("sections", "message"), HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("plain", [False, True], ids=["wrapper", "plain"])
def test_steps_without_a_bound(folder, sections, message, plain):
    edit(folder, **sections)
    with pytest.raises(CheckpointError, match=message) as error:
        load(folder, plain=plain)
    assert "\n" not in str(error.value) and len(str(error.value)) < len(str(folder)) + 250


def test_what_still_panics_is_one_line(folder, monkeypatch):
    """Rust's panics are no Exception."""
    from mlx_lm import tokenizer_utils

    def panic(*args, **kwargs):
        class PanicException(BaseException):
            pass

        raise PanicException("called `Option::unwrap()`\non a `None` value")

    monkeypatch.setattr(tokenizer_utils, "load", panic)
    with pytest.raises(CheckpointError, match=r"can be read: called .* on a `None` value"):
        load_tokenizer(folder)
    monkeypatch.setattr(tokenizer_utils, "load", lambda *a, **k: (_ for _ in ()).throw(SystemExit))
    with pytest.raises(SystemExit):
        load_tokenizer(folder)


def test_padding_of_any_length_is_not_used(folder):
    edit(
        folder,
        padding={
            "strategy": {"Fixed": 10**9},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<pad>",
        },
    )
    assert fast_tokenizer(folder, (), lambda: None) is None
    assert len(load_tokenizer(folder).encode("a")) < 10


FILES = {
    "tokenizer.json": "expected at most 64,000,000",
    "tokenizer_config.json": "expected at most 10,000,000",
    "special_tokens_map.json": "expected at most 10,000,000",
    "chat_template.jinja": "expected at most 1,000,000",
}


@pytest.mark.parametrize(("name", "message"), FILES.items(), ids=FILES)
def test_files_of_any_size_and_kind(folder, name, message):
    with (folder / name).open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match="not a regular file"):
        check_tokenizer_files(folder)


AMBIGUOUS = ("(a+)+", "(a*)*b", "(a|a)+", "((a)+)*", "(a|b){3,}", "(?:x+y?){2}", "(([ab])*c)*")
HARMLESS = (
    *(r" {2,}", r"\A +| +\z", r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|\s+(?!\S)|\s+"),
    *(r"\p{N}{1,3}(?=(?:\p{N}{3})*\b)", r"(abc)+", r"\(a+\)+", "[(a+)]+", "[a[(]b]+(c)*"),
    *("(a|b)?", "[^)]+)+", "(", "\\", "[", ""),
)


@pytest.mark.parametrize("pattern", AMBIGUOUS)
def test_expressions_that_backtrack(pattern):
    assert backtracks(pattern)


@pytest.mark.parametrize("pattern", HARMLESS)
def test_expressions_of_tokenizers(pattern):
    assert not backtracks(pattern)
