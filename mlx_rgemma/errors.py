"""Errors caused by user input, with one-line messages, and the quoting of outside values."""

from __future__ import annotations

from collections.abc import Iterable


class UserError(ValueError):
    """An error that the user can fix.

    The message is one line: the file or argument, the value found, the value expected or the
    remedy. Commands print it without a traceback and exit with status 1.
    """


class ConfigError(UserError):
    """A configuration that no Griffin model can have; the message names the key."""


class CheckpointError(UserError):
    """A checkpoint, tokenizer or cache file that is missing, damaged or of another model."""


MAX_SHOWN = 80
"""Characters of a value that a message repeats."""


def shown(value: object, limit: int = MAX_SHOWN) -> str:
    """Return `repr(value)` cut to `limit` characters, for messages that quote outside input.

    Control characters are escaped by `repr`. A long text is cut before it is formatted.
    """
    if isinstance(value, str | bytes):
        cut = value[: limit + 1]
        text = repr(cut)
    else:
        try:
            text = repr(value)
        except (ValueError, RecursionError):  # a huge integer, or nesting without end
            text = f"a {type(value).__name__} too large to print"
    return text if len(text) <= limit + 2 else f"{text[:limit]}..."


MAX_NAME = 200


def shortened(items: Iterable[str], limit: int = 5) -> str:
    """Return the first `limit` of many names, printable and of bounded length, for a message."""
    items = list(items)
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(_printable(item) for item in items[:limit]) + more


def _printable(name: str) -> str:
    text = name if name.isprintable() else repr(name)[1:-1]
    return text if len(text) <= MAX_NAME else f"{text[:MAX_NAME]}..."
