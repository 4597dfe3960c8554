"""Commands and Python examples of the documentation: where they are, and what they need to run."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import re
import shlex
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mlx_rgemma.__main__ import COMMANDS

ROOT = Path(__file__).parents[2]
PAGES = tuple(
    sorted(
        str(path.relative_to(ROOT))
        for path in (
            ROOT / "README.md",
            ROOT / "CONTRIBUTING.md",
            ROOT / "examples/finetune/README.md",
            *(ROOT / "docs").rglob("*.md"),
        )
    )
)

FENCE = re.compile(
    r"(?:^ *<!-- parsed only: (?P<reason>[^\n>]+) -->\n)?"
    r"^(?P<indent> *)```(?P<language>\w+)\n(?P<text>.*?)^ *```$",
    re.DOTALL | re.MULTILINE,
)
INLINE = re.compile(r"`((?:python -m mlx_rgemma\.|mlx-rgemma )[^`]+)`")

SET_UP = ("git", "source", "python3", "pip", "ruff", "mypy", "pytest", "mkdocs", "pre-commit")
"""Programs that prepare an environment; these commands are not run."""

LEARNED = ("gptq", "dynamic_quant", "dwq")
"""Sub-commands of `quantize` that pass flags on to mlx-lm."""


class Snippet(NamedTuple):
    """A fenced block of a page.

    Attributes:
        page: Path of the page.
        line: Line of its first line in the page.
        language: ``shell``, ``python`` and so on.
        text: Its content.
        reason: Why it cannot be run in a test; empty where it can.
    """

    page: str
    line: int
    language: str
    text: str
    reason: str


def snippets(page: str, language: str, text: str | None = None) -> list[Snippet]:
    """Return the blocks of a page, or of a text."""
    text = (ROOT / page).read_text(encoding="utf-8") if text is None else text
    found = []
    for match in FENCE.finditer(text):
        if match["language"] == language:
            line = text.count("\n", 0, match.start("text")) + 1
            body = re.sub(f"^{match['indent']}", "", match["text"], flags=re.MULTILINE)
            found.append(Snippet(page, line, language, body, match["reason"] or ""))
    return found


def simple_commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each command in a block; ``|`` and ``&&`` separate commands."""
    for line in text.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word in ("&&", "|"):
                if words:
                    yield words
                words = []
            else:
                words.append(word)


def inline_commands(page: str) -> Iterator[list[str]]:
    """Yield the words of the commands within the sentences of a page, if they have arguments."""
    text = FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
    for match in INLINE.finditer(text):
        words = shlex.split(match[1])
        if "..." not in words and any(word.startswith("-") for word in words[3:]):
            yield words


def check_command(words: list[str]) -> None:
    """Check a command's program, and the flags of this package's commands.

    Raises:
        AssertionError: If the program, a file or a flag does not exist.
    """
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    if words[0] == "mlx.launch":
        words = words[words.index("--") + 1 :]
    if words[0] == "uvx":
        words = words[words.index("mlx-rgemma") :]
    command, arguments = _own_command(words)
    if command:
        _check_flags(command, arguments)
    elif words[0] == "python" and words[1] != "-m":
        assert (ROOT / words[1]).is_file(), f"no such file: {words[1]}"
    elif words != ["mlx-rgemma", "--help"]:
        known = words[0] in (*SET_UP, "cd", "cat", "hf", "bash")
        known = known or words[:3] in (["python", "-m", "pytest"], ["python", "-m", "mlx_lm"])
        assert known, f"unknown command: {shlex.join(words)}"


def all_flags() -> set[str]:
    """Return the flags of all commands, of mlx-lm's quantizers, and of benchmarks and examples."""
    flags: set[str] = set()
    for command in COMMANDS:
        parser = _parser(command)
        nested = [a.choices.values() for a in parser._actions if a.dest == "command" and a.choices]
        for each in (parser, *(inner for choices in nested for inner in choices)):
            flags.update(name for action in each._actions for name in action.option_strings)
    for name in LEARNED:
        source = inspect.getsource(importlib.import_module(f"mlx_lm.quant.{name}"))
        flags.update(re.findall(r'"(--[a-z-]+)"', source))
    for folder in ("benchmarks", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            flags.update(re.findall(r'"(--[a-z-]+)"', path.read_text(encoding="utf-8")))
    return flags


def is_set_up(words: list[str]) -> bool:
    """Return whether a command prepares the environment, or runs these tests."""
    return words[0] in (*SET_UP, "cd") or words[:3] == ["python", "-m", "pytest"]


def _own_command(words: list[str]) -> tuple[str, list[str]]:
    """Return the name and the arguments of a command of this package, or of `benchmarks`."""
    if words[:2] == ["python", "-m"] and words[2].startswith("benchmarks."):
        return words[2], words[3:]
    if words[:2] == ["python", "-m"] and words[2].startswith("mlx_rgemma."):
        return words[2].removeprefix("mlx_rgemma."), words[3:]
    if words[0] == "mlx-rgemma" and not words[1].startswith("-"):
        return words[1], words[2:]
    return "", []


def _parser(command: str) -> argparse.ArgumentParser:
    module = command if command.startswith("benchmarks.") else f"mlx_rgemma.{command}"
    module += ".command" if command == "server" else ""
    parser: argparse.ArgumentParser = importlib.import_module(module).build_parser()
    parser.allow_abbrev = False
    return parser


def _check_flags(command: str, arguments: list[str]) -> None:
    known = command in COMMANDS or (ROOT / f"{command.replace('.', '/')}.py").is_file()
    assert known, f"no such command: {command}"
    parser = _parser(command)
    learned = arguments[0] if command == "quantize" and arguments[0] in LEARNED else ""
    try:
        _, rest = parser.parse_known_args(arguments)
    except SystemExit as error:
        raise AssertionError(f"{command} refuses: {shlex.join(arguments)}") from error
    source = (
        inspect.getsource(importlib.import_module(f"mlx_lm.quant.{learned}")) if learned else ""
    )
    unknown = [word for word in rest if not learned or f'"{word}"' not in source]
    unknown = [word for word in unknown if not learned or word.startswith("-")]
    assert not unknown, f"{command} has no {unknown}"


class Workplace:
    """A folder with everything that the documentation's examples read.

    The released models are replaced by the embedded one, with Gemma's chat template where the name
    ends with -it.
    """

    def __init__(self, folder: Path) -> None:
        from mlx_rgemma.tokenizers.sentencepiece import CHAT_TEMPLATE

        embedded = ROOT / "mlx_rgemma/assets/embedded"
        self.cwd, self.chat = folder / "work", folder / "chat"
        self.bin = folder / "bin"
        shutil.copytree(embedded, self.chat)
        config = self.chat / "tokenizer_config.json"
        values = json.loads(config.read_text())
        config.write_text(json.dumps({**values, "chat_template": CHAT_TEMPLATE}))
        self._replacements = (
            (re.compile(r"google/recurrentgemma-\w+-it"), str(self.chat)),
            (re.compile(r"google/recurrentgemma-\w+|\bMODEL\b"), str(embedded)),
        )
        stories = (ROOT / "mlx_rgemma/assets/stories.txt").read_text(encoding="utf-8")
        self.cwd.mkdir()
        for name in ("book.txt", "letter.txt", "text.txt"):
            (self.cwd / name).write_text(stories[:2000], encoding="utf-8")
        self.bin.mkdir()
        for name, module in (("python", ""), ("mlx-rgemma", "-m mlx_rgemma")):
            program = self.bin / name
            program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {module} "$@"\n')
            program.chmod(program.stat().st_mode | stat.S_IXUSR)

    def adapted(self, text: str) -> str:
        """Return an example with the embedded model in place of the released ones."""
        for pattern, value in self._replacements:
            text = pattern.sub(value, text)
        return text
