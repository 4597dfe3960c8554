"""Progress line on a terminal while a long prompt is read."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any

from mlx_rgemma.ops.backend import compile_seconds

CLEAR = "\r\033[K"


def reading_line(
    tokens: int, seconds: float, total: int | None = None, *, estimated: bool = False
) -> str:
    """Return the line: "Reading 36,865 of 285,000 tokens (13%), 2,016 tok/s, 2 min left".

    Args:
        tokens: Tokens read so far.
        seconds: Duration so far.
        total: Tokens of the whole text, if known.
        estimated: Whether `total` is an estimate.
    """
    whole = f" of {'~' if estimated else ''}{total:,}" if total else ""
    line = f"Reading {tokens:,}{whole} tokens"
    if total:
        line += f" ({min(100 * tokens // total, 100)}%)"
    if tokens and seconds > 0:
        line += f", {tokens / seconds:,.0f} tok/s"
        if total:
            line += f", {_duration(max(total - tokens, 0) * seconds / tokens)} left"
    return line


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def show_reading(
    tokens: int, seconds: float, total: int | None = None, *, estimated: bool = False
) -> None:
    """Show `reading_line` on stderr if it is a terminal, replacing the previous line."""
    if sys.stderr.isatty():
        line = reading_line(tokens, seconds, total, estimated=estimated)
        width = shutil.get_terminal_size().columns - 1
        print(CLEAR + line[:width], end="", file=sys.stderr, flush=True)


def clear_reading() -> None:
    """Remove the line."""
    if sys.stderr.isatty():
        print(CLEAR, end="", file=sys.stderr, flush=True)


def prompt_progress(step_size: int) -> Callable[[int, int], None]:
    """Return a `prompt_progress_callback` that shows the line for prompts of several chunks."""
    started = time.perf_counter()

    def show(done: int, total: int) -> None:
        nonlocal started
        if done == 0:
            started = time.perf_counter()
        if total <= step_size:
            return
        if done >= total:
            clear_reading()
        else:
            seconds = time.perf_counter() - started - compile_seconds(started)
            show_reading(done, seconds, total)

    return show


def source_progress(source: Any) -> Callable[[Any], None]:
    """Return a `Session.feed` callback that shows the line.

    The number of tokens of a file is estimated from its size, once a part of it has been read.

    Args:
        source: The source of `feed`: a text, or an open file.
    """
    position, total = 0, None

    def show(reading: Any) -> None:
        nonlocal position, total
        here = _position(source)
        if here != position:
            # The file is read in pieces: everything before the last position is tokenized.
            if position:
                total = int(reading.tokens * _size(source) / position)
            position = here
        show_reading(reading.tokens, reading.seconds, total, estimated=True)

    return show


def _position(source: Any) -> int:
    """Return the bytes read of a file on disk; 0 for other sources."""
    try:
        return int(source.buffer.tell())
    except (AttributeError, OSError, ValueError):
        return 0


def _size(source: Any) -> int:
    return os.fstat(source.buffer.fileno()).st_size
