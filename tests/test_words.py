"""Forbidden words: the package speaks the field's language."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIST = Path(__file__).with_name("forbidden_words.txt")
TEXTS = ("mlx_rgemma", "metal", "benchmarks", "docs", "examples", "README.md", "CONTRIBUTING.md")
KINDS = (".py", ".metal", ".md", ".sh", ".yaml")

pytestmark = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").is_file(), reason="not a clone of the repository"
)


def forbidden() -> dict[str, str]:
    lines = LIST.read_text(encoding="utf-8").splitlines()
    return dict(line.split("\t") for line in lines if line and not line.startswith("#"))


def texts() -> dict[str, str]:
    """Return the lines to look at, by file and number."""
    found = {}
    for name in TEXTS:
        place = ROOT / name
        files = [place] if place.is_file() else sorted(place.rglob("*"))
        for file in files:
            if file.suffix in KINDS:
                for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
                    found[f"{file.relative_to(ROOT)}:{number}"] = line
    for file in (ROOT / "tests").rglob("test_*.py"):
        where = str(file.relative_to(ROOT))
        found[where] = file.stem.replace("_", " ")
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if match := re.match(r"\s*def (test_\w+)", line):
                found[f"{where}:{number}"] = f"{match[1]} {match[1].replace('_', ' ')}"
    return found


@pytest.fixture(scope="module")
def lines() -> dict[str, str]:
    return texts()


@pytest.mark.parametrize("word", forbidden())
def test_no_text_has_a_forbidden_word(word, lines):
    pattern = re.compile(word)
    found = [f"{where}: {line.strip()}" for where, line in lines.items() if pattern.search(line)]
    assert not found, f"{word}: say {forbidden()[word]}\n" + "\n".join(found)


def test_texts_of_every_place_are_found(lines):
    for name in (*TEXTS, "tests"):
        assert any(where.startswith(name) for where in lines), name
    assert all(re.compile(word) and instead for word, instead in forbidden().items())
