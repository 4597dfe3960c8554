"""Commands of the documentation are valid: programs, files and flags; links lead somewhere."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from helpers.snippets import (
    FENCE,
    PAGES,
    ROOT,
    all_flags,
    check_command,
    inline_commands,
    simple_commands,
    snippets,
)

LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"")
FILE = re.compile(
    r"`((?:benchmarks|examples|tests|docs|packages|mlx_rgemma|metal)/[\w./*-]*\w)[` ]"
)
OTHER_FLAGS = {"--env", "--index-url"}
"""Flags of other programs: `mlx.launch`, pip."""
VARIABLE = re.compile(r"\bMLX_RGEMMA_[A-Z_]+")


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_valid(page):
    for snippet in snippets(page, "shell"):
        for words in simple_commands(snippet.text):
            check_command(words)
    for words in inline_commands(page):
        check_command(words)


@pytest.mark.parametrize(
    "text",
    [
        "python -m mlx_rgemma.generate --promt x",
        "python -m mlx_rgemma.generat --prompt x",
        "mlx-rgemma generate --temp hot",
        "mlx-rgemma server --prompt x",
        "cat a | python -m mlx_rgemma.cache_prompt --prompt-cache-fil b --prompt -",
        "mlx.launch -n 2 -- python -m mlx_rgemma.lora --trian",
        "python -m mlx_rgemma.quantize gptq --model m --sequence-lenght 3",
        "python -m mlx_rgemma.quantize compare --modle m",
        "python examples/missing.py",
        "pyton -m mlx_rgemma.generate",
    ],
)
def test_mistakes_are_found(text):
    (snippet,) = snippets("page", "shell", f"text\n\n```shell\n{text}\n```\n")
    with pytest.raises(AssertionError):
        for words in simple_commands(snippet.text):
            check_command(words)


@pytest.mark.parametrize("page", PAGES)
def test_data_is_valid(page):
    for snippet in snippets(page, "json"):
        json.loads(snippet.text)
    for snippet in snippets(page, "yaml"):
        yaml.safe_load(snippet.text)


def test_blocks_are_found():
    first = "a\n<!-- parsed only: why -->\n```shell\nls\n```\n\n"
    second = "- b\n\n  ```python\n  x\n  ```\n\n```\noutput\n```\n\n"
    third = "<!-- parsed only: too -->\n```shell\ncd\n```\n"
    text = first + second + third
    found = [(s.line, s.text, s.reason) for s in snippets("p", "shell", text)]
    assert found == [(4, "ls\n", "why"), (19, "cd\n", "too")]
    found = [(s.line, s.text, s.reason) for s in snippets("p", "python", text)]
    assert found == [(10, "x\n", "")]


@pytest.mark.parametrize("page", PAGES)
def test_blocks_name_a_language_that_is_checked(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    languages = set(re.findall(r"^ *```(\w+)$", text, re.MULTILINE))
    assert languages <= {"shell", "python", "json", "yaml"}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    path = ROOT / page
    for match in LINK.finditer(path.read_text(encoding="utf-8")):
        target = match[1] or match[2]
        own = "https://github.com/mlx-rgemma/mlx-rgemma/"
        if target.startswith((f"{own}blob/main/", f"{own}tree/main/")):
            target, folder = target.split("/main/", 1)[1], ROOT
        elif target.startswith(("https:", "http:")):
            continue
        else:
            folder = path.parent
        file, _, anchor = target.partition("#")
        found = folder / file if file else path
        assert found.exists(), target
        if anchor:
            assert anchor in anchors(found.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("page", PAGES)
def test_flags_within_sentences_exist(page):
    text = FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*\w", text))
    assert not named - all_flags() - OTHER_FLAGS


@pytest.mark.parametrize("page", PAGES)
def test_files_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    names = [name for name in FILE.findall(text) if not re.search(r"\bX\.|_X\.", name)]
    missing = [name for name in names if not list(ROOT.glob(name))]
    assert not missing


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and mkdocs make them."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_environment_variable_is_documented():
    page = (ROOT / "docs/environment-variables.md").read_text(encoding="utf-8")
    sources = "".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "mlx_rgemma").rglob("*.py")
    )
    assert set(VARIABLE.findall(page)) == set(VARIABLE.findall(sources))


def test_the_first_lines_need_no_preparation():
    """An externally managed Python (PEP 668) refuses `pip install` outside an environment."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in ("generate", "test"):
        block = re.search(rf"<!-- {name} -->\n```shell\n(.*?)```", text, re.DOTALL)
        assert block and "source .venv/bin/activate" in block[1].split("pip install")[0]
