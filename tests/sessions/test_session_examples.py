"""The examples with sessions run as they stand, and say what they are meant to show."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *args: str) -> str:
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *args], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_ask_a_book(tmp_path):
    book, state = tmp_path / "book.txt", tmp_path / "book.safetensors"
    book.write_text("Once upon a time there was a dog named Max. He liked to swim.", "utf-8")
    options = ["--book", str(book), "--state", str(state), "--max-tokens", "8"]
    first = run("ask_a_book.py", *options, "--question", " Max", "--question", " The cat")
    book.unlink()  # the second time it is not read
    second = run("ask_a_book.py", *options, "--question", " Max", "--question", " The cat")
    assert first.count("> ") == 2
    assert first.endswith(second) and second.startswith("17 tokens in")
    other = run("ask_a_book.py", *options, "--question", " The cat", "--question", " Max")
    answers = [sorted(out.split("> ")[1:]) for out in (first, other)]
    assert [a.strip() for a in answers[0]] == [a.strip() for a in answers[1]]


def test_endless_stream():
    lines = run("endless_stream.py", "--tokens", "300").splitlines()
    rows = [line.replace(",", "").split() for line in lines[1:]]
    assert [int(row[0]) for row in rows] == list(range(30, 301, 30))
    assert {row[1] for row in rows} == {"111360"}
    held = [float(row[2]) for row in rows]
    assert max(held) - min(held) < 1
