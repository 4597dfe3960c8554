"""Files from outside: regular ones only, of bounded size, JSON of bounded depth, bounded lines."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mlx_rgemma.errors import CheckpointError

MAX_JSON_BYTES = 10_000_000
"""Size of a JSON file: the index of a large model takes a hundredth of it."""

MAX_JSON_DEPTH = 50
"""Nesting of JSON: Orbax, the deepest writer of those that are read, needs less than ten."""

MAX_INTEGER_BITS = 256
"""tokenizer_config.json states 10**30 for "no limit"."""

MAX_LINE_BYTES = 16_000_000
"""Longest line of a JSONL file: more than the longest books."""

MAX_REASON = 300
"""Characters of another library's message that are repeated."""


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading, without waiting for the writer of a pipe.

    Raises:
        CheckpointError: If the file is missing, cannot be read, or is a device or a pipe.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise CheckpointError(f"{path}: not a regular file, cannot be read.")
        return os.fdopen(handle, "rb")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file.") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}).") from error


def read_limited(path: Path, limit: int) -> bytes:
    """Return the content of a file that is no longer than `limit` bytes.

    Raises:
        CheckpointError: If it is longer, or for a reason of `open_regular`.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size <= limit:
            try:
                data = file.read(limit + 1)
            except OSError as error:
                reason = error.strerror or error
                raise CheckpointError(f"{path}: cannot be read ({reason}).") from error
            if len(data) <= limit:
                return data
    raise CheckpointError(f"{path}: {size:,} bytes, expected at most {limit:,}.")


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the number and text of each line that is not blank, one line in memory at a time.

    Raises:
        CheckpointError: If a line is not UTF-8 or longer than `MAX_LINE_BYTES`, or for a reason of
            `open_regular`.
    """
    with open_regular(path) as file:
        number = 0
        while data := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(data) > MAX_LINE_BYTES:
                raise CheckpointError(
                    f"{path}: line {number} is longer than {MAX_LINE_BYTES:,} bytes; split it."
                )
            try:
                text = data.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise CheckpointError(
                    f"{path}: line {number} is not UTF-8 text ({error.reason} at byte"
                    f" {error.start + 1})."
                ) from error
            if not text.isspace() and text:
                yield number, text


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Return the JSON object of a file.

    Its nesting and its integers are bounded, and its texts can be written as UTF-8, so that other
    code can format and save what it returns.

    Raises:
        CheckpointError: If the file cannot be read or holds anything else.
    """
    data = read_limited(path, limit)
    try:
        values = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        where = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
        raise CheckpointError(f"{path}: not valid JSON{where}.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: not a JSON object.")
    if problem := _problem(values):
        raise CheckpointError(f"{path}: holds {problem}; this is refused.")
    return values


def _problem(values: dict[str, Any]) -> str | None:
    """Return what makes parsed JSON unsafe to use, if anything."""
    stack = [iter([values])]
    while stack:
        for value in stack[-1]:
            if isinstance(value, dict | list):
                if len(stack) > MAX_JSON_DEPTH:
                    return f"more than {MAX_JSON_DEPTH} levels of brackets"
                if isinstance(value, dict) and not all(map(_is_unicode, value)):
                    return "half a surrogate pair in a key"
                stack.append(iter(value.values() if isinstance(value, dict) else value))
                break
            if isinstance(value, int) and value.bit_length() > MAX_INTEGER_BITS:
                return f"an integer of more than {MAX_INTEGER_BITS} bits"
            if isinstance(value, str) and not _is_unicode(value):
                return "half a surrogate pair in a text"
        else:
            stack.pop()
    return None


def _is_unicode(text: str) -> bool:
    """Return whether a text can be written as UTF-8; `\\ud800` in JSON cannot."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def reason(error: BaseException) -> str:
    """Return the message of an error as one line of bounded length."""
    text = " ".join(str(error)[: 4 * MAX_REASON].split()) or type(error).__name__
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]}..."
