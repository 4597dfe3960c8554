"""Texts that a user gives: a file of text, JSON lines, or standard input."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

from mlx_rgemma.errors import UserError
from mlx_rgemma.io.reading import read_limited, reason

MAX_BYTES = 1_000_000_000
"""Size of a text, which is held in memory."""

DEFAULT_TEXT = Path(__file__).parents[1] / "assets" / "stories.txt"
"""Short stories, written for measurements with this package; no model was trained on them."""


def read_documents(path: str | Path | None = None, tokenizer: Any = None) -> list[str]:
    """The documents of a file.

    Args:
        path: A text file, which is one document; a `.jsonl` file with one object a line (`text`,
            `prompt` and `completion`, or `messages`); `-` for text on standard input; None for the
            stories that come with the package, one document each.
        tokenizer: For the chat template of `messages`.

    Raises:
        UserError: If the file cannot be read, holds nothing, or a line is not what it should be.
    """
    if path is None:
        return DEFAULT_TEXT.read_text(encoding="utf-8").strip().split("\n\n")
    name = "standard input" if str(path) == "-" else str(path)
    try:
        text = _read(Path(path).expanduser()) if str(path) != "-" else _read_stdin()
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 text ({error.reason}).") from error
    if name.endswith(".jsonl"):
        lines = enumerate(text.splitlines(), start=1)
        documents = [_document(name, n, line, tokenizer) for n, line in lines if line.strip()]
    else:
        documents = [text]
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise UserError(f"{name}: holds no text.")
    return documents


def _read(path: Path) -> str:
    if path.is_dir():
        raise UserError(f"{path}: a folder; give a file of text, or a .jsonl file.")
    if not path.exists():
        raise UserError(f"{path}: no such file; give a file of text, a .jsonl file, or - (stdin).")
    if not path.is_file():
        raise UserError(f"{path}: not a regular file; give - and pipe it in.")
    text = read_limited(path, MAX_BYTES).decode("utf-8")
    return io.StringIO(text, newline=None).read()


def _read_stdin() -> str:
    text = sys.stdin.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise UserError(f"standard input: expected at most {MAX_BYTES:,} characters.")
    return text


def _document(name: str, number: int, line: str, tokenizer: Any) -> str:
    """The text of one line of JSON."""
    text = _text(name, number, line, tokenizer)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name}: line {number} holds half a surrogate pair.") from error
    return text


def _text(name: str, number: int, line: str, tokenizer: Any) -> str:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: line {number} is not JSON.") from error
    if isinstance(values, dict):
        if isinstance(values.get("text"), str):
            return values["text"]
        if isinstance(values.get("prompt"), str) and isinstance(values.get("completion"), str):
            return values["prompt"] + values["completion"]
        if isinstance(values.get("messages"), list):
            return _chat(name, number, values["messages"], tokenizer)
    raise UserError(
        f"{name}: line {number} has neither 'text' nor 'prompt' and 'completion' nor 'messages'."
    )


def _chat(name: str, number: int, messages: list[Any], tokenizer: Any) -> str:
    if not getattr(tokenizer, "has_chat_template", False):
        raise UserError(f"{name}: line {number} has messages, but the model has no chat template.")
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # templates raise errors of their own making
        raise UserError(
            f"{name}: line {number}: the model's chat template refuses it: {reason(error)}."
        ) from error
    return text.removeprefix(tokenizer.bos_token or "")
