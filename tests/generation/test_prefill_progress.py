"""The line that is shown while a long prompt is read."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest

from mlx_rgemma import generate, load
from mlx_rgemma.generation import progress
from mlx_rgemma.generation.progress import CLEAR, reading_line
from mlx_rgemma.sessions.session import PrefillProgress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        return self.getvalue().split(CLEAR)[1:]


@pytest.fixture
def terminal(monkeypatch) -> Terminal:
    screen = Terminal()
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=screen))
    return screen


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            (36865, 18.286, 285000),
            "Reading 36,865 of 285,000 tokens (12%), 2,016 tok/s, 2 min left",
        ),
        ((0, 0.0, 285000), "Reading 0 of 285,000 tokens (0%)"),
        ((2048, 1.0, None), "Reading 2,048 tokens, 2,048 tok/s"),
        ((2048, 1.0, 4096), "Reading 2,048 of 4,096 tokens (50%), 2,048 tok/s, 1 s left"),
        ((1000, 100.0, 100_000), "Reading 1,000 of 100,000 tokens (1%), 10 tok/s, 2 h 45 min left"),
        ((5000, 1.0, 4000), "Reading 5,000 of 4,000 tokens (100%), 5,000 tok/s, 0 s left"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_how_far_how_fast_how_long(arguments, expected):
    assert reading_line(*arguments) == expected


def test_an_estimate_is_marked():
    assert reading_line(10, 1.0, 20, estimated=True).startswith("Reading 10 of ~20 tokens (50%)")


def test_generate_shows_it_for_prompts_of_several_chunks(terminal):
    model, tokenizer = load()
    prompt = [5] * 40
    show = progress.prompt_progress(16)
    generate(
        model, tokenizer, prompt, max_tokens=1, prefill_step_size=16, prompt_progress_callback=show
    )
    first, second, third, last = terminal.lines()
    assert first == "Reading 0 of 40 tokens (0%)"
    assert second.startswith("Reading 16 of 40 tokens (40%), ")
    assert third.startswith("Reading 32 of 40 tokens (80%), ") and third.endswith(" s left")
    assert last == ""  # removed before the text


def test_short_prompts_show_nothing(terminal):
    show = progress.prompt_progress(16)
    show(0, 16)
    show(16, 16)
    assert terminal.getvalue() == ""


def test_nothing_is_shown_where_there_is_no_terminal(capsys):
    progress.show_reading(10, 1.0, 20)
    progress.clear_reading()
    assert capsys.readouterr().err == ""


def test_a_line_fits_the_terminal(terminal, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    progress.show_reading(36865, 18.286, 285000)
    assert terminal.lines() == ["Reading 36,865 of 2"]


def test_the_tokens_of_a_file_are_estimated_from_its_size(terminal, tmp_path):
    """A file is read a piece at a time, and all tokens of a piece before the next."""
    file, piece, letters_per_token = tmp_path / "book.txt", 1 << 16, 4
    file.write_text("x" * (5 * piece), encoding="utf-8")
    with open(file, encoding="utf-8") as source:
        show = progress.source_progress(source)
        tokens = 0
        while text := source.read(piece):
            for _ in range(0, len(text) // letters_per_token, 2048):
                tokens += 2048
                show(PrefillProgress(tokens, 1.0))
    lines = terminal.lines()
    assert " of " not in lines[0]  # nothing is known yet
    guesses = [int(line.split("~")[1].split()[0].replace(",", "")) for line in lines if "~" in line]
    assert len(guesses) == len(lines) * 4 // 5
    assert all(abs(guess - tokens) < 0.2 * tokens for guess in guesses)


def test_a_text_has_no_size(terminal):
    show = progress.source_progress("A text.")
    show(PrefillProgress(100, 1.0))
    assert terminal.lines() == ["Reading 100 tokens, 100 tok/s"]
