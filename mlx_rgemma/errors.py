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
