"""What goes wrong through no fault of the program: wrong input, told in one line."""

from __future__ import annotations

from collections.abc import Iterable


class UserError(ValueError):
    """Something that the user can mend.

    The message is one line: which file or argument, what was found, what was expected or what to
    do. Commands print it without a traceback and exit with status 1.
    """


class ConfigError(UserError):
    """A configuration that no Griffin model can have; the message names the key."""


class CheckpointError(UserError):
    """A checkpoint, tokenizer or cache file that is missing, damaged or of another model."""


MAX_SHOWN = 80
"""Characters of a value that a message repeats."""

MAX_NAME = 200
"""Characters of one of many names."""


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


def shortened(items: Iterable[str], limit: int = 5) -> str:
    """Return the first few of many names, printable, for a message of one line."""
    items = list(items)
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(_printable(item) for item in items[:limit]) + more


def _printable(name: str) -> str:
    text = name if name.isprintable() else repr(name)[1:-1]
    return text if len(text) <= MAX_NAME else f"{text[:MAX_NAME]}..."
