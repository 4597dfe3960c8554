"""Validation of tokenizer files before the `tokenizers` library runs them.

The library runs the steps of a tokenizer.json as they are: a regular expression with catastrophic
backtracking panics, and a few chained replacements of one character by ten fill the memory.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_rgemma.errors import CheckpointError, shown
from mlx_rgemma.io.reading import read_json, read_limited
from mlx_rgemma.tokenizers.charsmap import charsmap_problem

TOKENIZER = "tokenizer.json"
SENTENCEPIECE = "tokenizer.model"
TOKENIZER_CONFIG = "tokenizer_config.json"
JSON_FILES = (
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
)
TEXT_FILES = ("chat_template.jinja",)

MAX_TOKENIZER_BYTES, MAX_SENTENCEPIECE_BYTES = 64_000_000, 16_000_000
"""Several times the size for a vocabulary of 256,000."""

MAX_ADDED_TOKENS = 50_000

MAX_TEXT_BYTES = 1_000_000
MAX_PATTERN = 100_000
MAX_STEPS = 100
MAX_GROWTH = 1000
"""Factor by which normalization may lengthen a text."""

ESCAPE = re.compile(r"\\[pP]\{[^}]*\}|\\.|\\$", re.DOTALL)
EXACT = re.compile(r"\{\d+\}")
"""An unambiguous repetition."""

STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")


def check_tokenizer_files(folder: Path) -> None:
    """Check the files of a tokenizer before other libraries read them.

    Raises:
        CheckpointError: If one is a device or a pipe, too large, not JSON, or needs unbounded time
            or memory.
    """
    for name in JSON_FILES:
        if (folder / name).exists():
            read_json(folder / name)
    for name in (*TEXT_FILES, *(f"chat_templates/{p.name}" for p in _templates(folder))):
        if (folder / name).exists():
            read_limited(folder / name, MAX_TEXT_BYTES)
    if (folder / TOKENIZER).exists():
        read_tokenizer(folder / TOKENIZER)


def read_tokenizer(path: Path) -> dict[str, Any]:
    """Return a tokenizer.json, whose steps need bounded time and memory.

    Raises:
        CheckpointError: If they do not, or the file cannot be read.
    """
    data = read_limited(path, MAX_TOKENIZER_BYTES)
    try:
        values = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a tokenizer that can be read: not JSON.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: not a tokenizer that can be read: not a JSON object.")
    added = values.get("added_tokens")
    if isinstance(added, list) and len(added) > MAX_ADDED_TOKENS:
        raise CheckpointError(
            f"{path}: {len(added):,} added tokens, expected up to {MAX_ADDED_TOKENS:,}."
        )
    for section in STEPS:
        if problem := _problem(values.get(section)):
            raise CheckpointError(f"{path}: {section} has {problem}; this is refused.")
    return values


def _templates(folder: Path) -> list[Path]:
    """Return the additional chat templates of a folder that transformers reads."""
    found = sorted((folder / "chat_templates").glob("*.jinja"))
    if len(found) > MAX_STEPS:
        raise CheckpointError(f"{folder}: has more than {MAX_STEPS} chat templates.")
    return found


def _problem(section: Any) -> str | None:
    """Return what makes the steps of a section unsafe to run, if anything."""
    growth = 1
    for count, step in enumerate(_objects(section)):
        if count >= MAX_STEPS:
            return f"more than {MAX_STEPS} steps"
        pattern = step.get("Regex")
        if isinstance(pattern, str) and (len(pattern) > MAX_PATTERN or backtracks(pattern)):
            return f"the regular expression {shown(pattern)}, which may backtrack without end"
        for key in ("content", "prepend"):
            if isinstance(step.get(key), str):
                growth *= 1 + len(step[key]) if key == "prepend" else max(1, len(step[key]))
        charsmap = step.get("precompiled_charsmap")
        if isinstance(charsmap, str) and (problem := _charsmap_problem(charsmap)):
            return f"a precompiled_charsmap {problem}"
    return "replacements that make a text too long" if growth > MAX_GROWTH else None


def _charsmap_problem(text: str) -> str | None:
    if len(text) > MAX_TEXT_BYTES:
        return f"of {len(text):,} bytes"
    try:
        problem = charsmap_problem(base64.b64decode(text, validate=True))
    except ValueError:
        return "that is not base64"
    return problem and f"with {problem}"


def _objects(section: Any) -> Iterator[dict[str, Any]]:
    """Yield the objects of a section at any depth, without lists of tokens."""
    stack = [section]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            yield value
            stack += [
                v for key, v in value.items() if key not in ("special_tokens", "single", "pair")
            ]
        elif isinstance(value, list):
            stack += value


def backtracks(pattern: str) -> bool:
    """Return whether a regular expression may take exponential time.

    It may if a repeated group contains a repetition or alternatives, as in `(a+)+` or `(a|a)*`.
    """
    groups = [False]
    at = 0
    while at < len(pattern):
        character = pattern[at]
        if escape := ESCAPE.match(pattern, at):
            at = escape.end() - 1
        elif exact := EXACT.match(pattern, at):
            at = exact.end() - 1
        elif character == "[":
            at = _end_of_class(pattern, at)
        elif character == "(":
            groups.append(False)
        elif character == ")" and len(groups) > 1:
            ambiguous = groups.pop()
            if ambiguous and pattern[at + 1 : at + 2] in ("*", "+", "{"):
                return True
            groups[-1] |= ambiguous
        elif character in "*+{|":
            groups[-1] = True
        at += 1
    return False


def _end_of_class(pattern: str, at: int) -> int:
    """Return the position of the bracket that closes a class; classes may be nested."""
    depth = 0
    while at < len(pattern):
        if pattern[at] == "\\":
            at += 1
        elif pattern[at] == "[":
            depth += 1
        elif pattern[at] == "]":
            depth -= 1
            if depth == 0:
                break
        at += 1
    return at
