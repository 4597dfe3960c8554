"""Texts of a user: what is no file, has no end, or no decoder can handle is one line."""

from __future__ import annotations

import io
import os

import pytest

from mlx_rgemma.errors import UserError
from mlx_rgemma.io import text as files
from mlx_rgemma.io.text import read_documents

LINES = {
    "brackets": ("[" * 500_000, "line 1 is nested too deeply"),
    "digits": ('{"text": ' + "9" * 5000 + "}", "line 1 has a number of too many digits"),
    "half a pair": (r'{"text": "\ud800"}', "line 1 holds half a surrogate pair"),
}


@pytest.mark.parametrize(("line", "message"), LINES.values(), ids=LINES)
def test_lines(tmp_path, line, message):
    (tmp_path / "x.jsonl").write_text(line)
    with pytest.raises(UserError, match=message):
        read_documents(tmp_path / "x.jsonl")


def test_devices_and_pipes(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(UserError, match="not a regular file; give - and pipe it in"):
            read_documents(path)


def test_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_BYTES", 10)
    (tmp_path / "x.txt").write_text("a" * 11)
    with pytest.raises(UserError, match="11 bytes, expected at most 10"):
        read_documents(tmp_path / "x.txt")
    monkeypatch.setattr("sys.stdin", io.StringIO("a" * 11))
    with pytest.raises(UserError, match="standard input: expected at most 10 characters"):
        read_documents("-")


def test_line_ends_of_other_systems(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"a\r\nb\rc\n")
    assert read_documents(tmp_path / "x.txt") == ["a\nb\nc\n"]


def test_a_template_s_complaint_is_cut(tmp_path):
    class Verbose:
        has_chat_template = True

        def apply_chat_template(self, messages, tokenize):
            raise ValueError("no\n" * 100_000)

    (tmp_path / "x.jsonl").write_text('{"messages": []}')
    with pytest.raises(UserError, match="refuses it: no no") as error:
        read_documents(tmp_path / "x.jsonl", Verbose())
    assert len(str(error.value)) < len(str(tmp_path)) + 400
