"""Files that users name: regular ones only, read in bounded pieces."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from mlx_rgemma.errors import UserError

MAX_LINE_BYTES = 16_000_000
"""Longest line of a JSONL file: more than the longest books."""


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading; devices and pipes, which may have no end, are refused.

    Raises:
        UserError: If there is no such file, it is none, or it cannot be read.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{path}: not a regular file.")
        return path.open("rb")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}).") from error


def read_limited(path: Path, limit: int) -> bytes:
    """Return a file's content, if it is not longer than `limit` bytes.

    Raises:
        UserError: If it is, or for a reason of `open_regular`.
    """
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise UserError(f"{path}: longer than {limit:,} bytes.")
    return data


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the number and text of each line that is not blank; only one is held at a time.

    Raises:
        UserError: If a line is not UTF-8 or longer than `MAX_LINE_BYTES`.
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
            if not text.isspace() and text:
                yield number, text
