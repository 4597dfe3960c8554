"""Text documents from a text file, JSON lines or standard input."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

from mlx_rgemma.errors import UserError
from mlx_rgemma.io.reading import is_unicode, parse_object, read_limited, reason

MAX_BYTES = 1_000_000_000
"""Size of a text, which is held in memory."""

DEFAULT_TEXT = Path(__file__).parents[1] / "assets" / "stories.txt"
"""Short stories, written for measurements with this package; no model was trained on them."""


def read_documents(path: str | Path | None = None, tokenizer: Any = None) -> list[str]:
    """Return the documents of a file.

    Args:
        path: A text file (one document); a `.jsonl` file with one object per line (`text`,
            `prompt` and `completion`, or `messages`); `-` for text on standard input; None for the
            stories of this package, one document each.
        tokenizer: For the chat template of `messages`.

    Raises:
        UserError: If the file cannot be read or holds no text, or a line has another form.
    """
    if path is None:
        return DEFAULT_TEXT.read_text(encoding="utf-8").strip().split("\n\n")
    name = "standard input" if str(path) == "-" else str(path)
    try:
        text = _read(Path(path).expanduser()) if str(path) != "-" else _read_stdin()
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 text ({error.reason}).") from error
    if name.endswith(".jsonl"):
        lines = enumerate(io.StringIO(text), start=1)
        documents = [
            _document(f"{name}: line {number}", line, tokenizer)
            for number, line in lines
            if line.strip()
        ]
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
    text = read_limited(path, MAX_BYTES).decode("utf-8-sig")
    return io.StringIO(text, newline=None).read()


def _read_stdin() -> str:
    text = sys.stdin.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise UserError(f"standard input: expected at most {MAX_BYTES:,} characters.")
    return text


def _document(where: str, line: str, tokenizer: Any) -> str:
    text = _text(where, parse_object(where, line), tokenizer)
    if not is_unicode(text):
        raise UserError(f"{where} holds half a surrogate pair.")
    return text


def _text(where: str, values: dict[str, Any], tokenizer: Any) -> str:
    if isinstance(values.get("text"), str):
        return values["text"]
    if isinstance(values.get("prompt"), str) and isinstance(values.get("completion"), str):
        return values["prompt"] + values["completion"]
    if isinstance(values.get("messages"), list):
        return _chat(where, values["messages"], tokenizer)
    raise UserError(f"{where} has neither 'text' nor 'prompt' and 'completion' nor 'messages'.")


def _chat(where: str, messages: list[Any], tokenizer: Any) -> str:
    if not getattr(tokenizer, "has_chat_template", False):
        raise UserError(f"{where} has messages, but the model has no chat template.")
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # templates raise exceptions of any type
        raise UserError(
            f"{where}: the model's chat template refuses it: {reason(error)}."
        ) from error
    return text.removeprefix(tokenizer.bos_token or "")
