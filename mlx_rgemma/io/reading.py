"""Reading files from outside: regular files of bounded size, lines, and JSON of bounded depth."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mlx_rgemma.errors import CheckpointError, UserError

MAX_JSON_BYTES = 10_000_000
"""Size of a JSON file. The index of a large model needs a hundredth of it."""

MAX_JSON_DEPTH = 50
"""Nesting of JSON. The deepest files that are read (Orbax) need less than 10."""

MAX_INTEGER_BITS = 256
"""tokenizer_config.json has 10**30 for "no limit"."""

MAX_LINE_BYTES = 16_000_000
"""Length of a line. The longest books are shorter."""

MAX_REASON = 300
"""Characters quoted from another library's message."""


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading; a pipe is refused without waiting for its writer.

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
    """Return the content of a file of at most `limit` bytes.

    Raises:
        CheckpointError: If the file is longer, or for a reason of `open_regular`.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise CheckpointError(f"{path}: {size:,} bytes, expected at most {limit:,}.")
        try:
            data = file.read(size + 1)  # allocates this size at once
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}).") from error
    if len(data) > size:
        raise CheckpointError(f"{path}: has grown while it was read; try again.")
    return data


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the number and text of each line that is not blank, holding one line at a time.

    Raises:
        UserError: If a line is not UTF-8 or longer than `MAX_LINE_BYTES`, or for a reason of
            `open_regular`.
    """
    with open_regular(path) as file:
        number = 0
        while data := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(data) > MAX_LINE_BYTES:
                raise UserError(
                    f"{path}: line {number} is longer than {MAX_LINE_BYTES:,} bytes; split it."
                )
            try:
                text = data.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}: line {number} is not UTF-8 text ({error.reason} at byte"
                    f" {error.start + 1})."
                ) from error
            if text and not text.isspace():
                yield number, text


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Return the JSON object of a file.

    Depth and integers are bounded, and all strings can be encoded as UTF-8, so other code can
    format and save the result.

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


def parse_object(where: str, text: str) -> dict[str, Any]:
    """Return the JSON object of a line; its depth is bounded by Python's parser only.

    Args:
        where: File and line, the beginning of a message.
        text: The line.

    Raises:
        UserError: If it is anything else.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON ({error.msg}).") from error
    except RecursionError:
        raise UserError(f"{where} is nested too deeply.") from None
    except ValueError as error:  # Python parses no integers of more than 4,300 digits
        raise UserError(f"{where} has a number of too many digits.") from error
    if not isinstance(values, dict):
        raise UserError(f"{where} is not a JSON object.")
    return values


def _problem(values: dict[str, Any]) -> str | None:
    """Return what makes parsed JSON unsafe to use, if anything."""
    stack = [iter([values])]
    while stack:
        for value in stack[-1]:
            if isinstance(value, dict | list):
                if len(stack) > MAX_JSON_DEPTH:
                    return f"more than {MAX_JSON_DEPTH} levels of brackets"
                if isinstance(value, dict) and not all(map(is_unicode, value)):
                    return "half a surrogate pair in a key"
                stack.append(iter(value.values() if isinstance(value, dict) else value))
                break
            if isinstance(value, int) and value.bit_length() > MAX_INTEGER_BITS:
                return f"an integer of more than {MAX_INTEGER_BITS} bits"
            if isinstance(value, str) and not is_unicode(value):
                return "half a surrogate pair in a text"
        else:
            stack.pop()
    return None


def is_unicode(text: str) -> bool:
    """Return whether a string can be encoded as UTF-8; `\\ud800` in JSON cannot."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_number(value: Any, minimum: float, maximum: float) -> bool:
    """Return whether a parsed value is a number within bounds; NaN and booleans are not."""
    return type(value) in (int, float) and minimum <= value <= maximum


def is_integer(value: Any, minimum: int, maximum: int) -> bool:
    """Return whether a parsed value is an integer within bounds; booleans are not."""
    return type(value) is int and minimum <= value <= maximum


def reason(error: BaseException) -> str:
    """Return the message of an error as one line of bounded length."""
    text = " ".join(str(error)[: 4 * MAX_REASON].split()) or type(error).__name__
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]}..."
