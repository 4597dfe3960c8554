"""Data files from anywhere: one line that names file and line number, in bounded memory."""

from __future__ import annotations

import lzma
import os
import tracemalloc
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

import mlx_rgemma.tuner.data.corpus as corpus
from mlx_rgemma import load
from mlx_rgemma.errors import UserError
from mlx_rgemma.io.reading import MAX_LINE_BYTES
from mlx_rgemma.tuner.data.datasets import read_examples

GOOD = b'{"text": "a b c"}\n'


def read(folder, **others):
    _, tokenizer = load()
    values = {"data": str(folder), "train": True, "test": False, "mask_prompt": False}
    return read_examples(SimpleNamespace(**{**values, **others}), tokenizer)


def refusal(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    return str(caught.value)


@contextmanager
def traced():
    """Yield a function that returns the peak of the memory that the block allocates."""
    found = []
    tracemalloc.start()
    try:
        yield lambda: found[0]
        found.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"[" * 100_000, "is nested too deeply"),
        (b'{"text": ' * 100_000, "is nested too deeply"),
        (b'{"text": ' + b"9" * 5000 + b"}", "has a number of too many digits"),
        (b'{"text": ' + b"9" * 4000 + b"}", "text is 9999"),
        (b'{"text": ' + b"[" * 400 + b"]" * 400 + b"}", "text is [[["),
        (b'{"text": "\xff"}', "is not UTF-8 text (invalid start byte at byte 11)"),
        (b'{"text": "\\ud800"}', "cannot be used"),
        (b'{"text": "' + b"x" * MAX_LINE_BYTES, "is longer than 16,000,000 bytes"),
        (b'{"text": "a"', "is not JSON (Expecting ',' delimiter)"),
        (b'{"message": "a"}', "lacks keys of the first line: text"),
    ],
    ids=lambda value: str(value[:12]),
)
def test_lines_that_cannot_be(line, message, tmp_path):
    (tmp_path / "train.jsonl").write_bytes(GOOD + b"\r\n" + line + b"\n" + GOOD)
    error = refusal(lambda: read(tmp_path))
    assert error.startswith(f"{tmp_path}/train.jsonl: line 3") and message in error


def test_a_line_without_end_is_not_held(tmp_path):
    with (tmp_path / "train.jsonl").open("wb") as file:
        file.write(GOOD)
        file.truncate(1 << 31)
    refusal(lambda: read(tmp_path))  # imports
    with traced() as peak:
        assert "line 2 is longer" in refusal(lambda: read(tmp_path))
    assert peak() < 4 * MAX_LINE_BYTES


def test_byte_order_mark_and_blank_lines(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD + b"\n \r\n" + GOOD[:-1])
    assert len(read(tmp_path)["train"]) == 2


def test_pipes_and_devices_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "train.jsonl")
    assert "train.jsonl: not a regular file" in refusal(lambda: read(tmp_path))
    for place in (tmp_path / "train.jsonl", "/dev/zero"):
        assert "not a regular file" in refusal(lambda place=place: corpus.read_source(str(place)))
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / "train.jsonl").symlink_to("/dev/zero")
    assert "train.jsonl: not a regular file" in refusal(lambda: read(tmp_path))


def test_names_of_columns_are_text(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(GOOD)
    assert refusal(lambda: read(tmp_path, text_feature=["text"])) == (
        "text_feature is ['text'], expected the name of a column."
    )


def test_texts_that_memory_does_not_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "physical_memory", lambda: 40_000_000)
    bomb = tmp_path / "bomb.txt.xz"
    bomb.write_bytes(lzma.compress(bytes(1_000_000), preset=0) * 100)
    assert bomb.stat().st_size < 100_000
    with traced() as peak:
        assert "more than a quarter" in refusal(lambda: corpus.read_source(str(bomb)))
    assert peak() < 50_000_000


def test_texts_that_are_not_utf8_name_the_line(tmp_path):
    (tmp_path / "latin.txt").write_bytes("a\n\nb\nMünze".encode("latin-1"))
    error = refusal(lambda: corpus.read_source(str(tmp_path / "latin.txt")))
    assert "latin.txt: not UTF-8 text (" in error and "in line 4)" in error
