"""What goes wrong through no fault of the program: wrong input, told in one line."""

from __future__ import annotations


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
