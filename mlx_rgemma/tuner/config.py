"""Settings from the command line, a YAML file and defaults, as mlx-lm's training takes them."""

from __future__ import annotations

import argparse
import copy
import re
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mlx_rgemma.errors import UserError, shortened, shown

EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d{1,2}")
"""Numbers like 1e-5, which YAML takes for text."""

MAX_COUNT = 10**9
MAX_SEED = 2**32 - 1
"""As for mlx-lm, which seeds NumPy."""

MAX_RATE = 1e30
"""Learning rates, norms and the like: float32 holds them and their products with small numbers."""

MAX_TOKENS = 1 << 24
"""Of a row, or of a batch of full rows."""


def merge_config(
    parser: argparse.ArgumentParser,
    given: Mapping[str, Any],
    defaults: Mapping[str, Any],
    others: Sequence[str] = (),
) -> SimpleNamespace:
    """Settings in the order: command line, configuration file, defaults.

    Args:
        parser: Its types and choices hold for the file, too.
        given: What the command line said; None stands for nothing.
        defaults: Of everything that can be set.
        others: Keys that the file may have besides.

    Raises:
        UserError: For a reason of `read_settings`.
    """
    chosen = {key: value for key, value in given.items() if value is not None}
    if given.get("config") is not None:
        found = read_settings(given["config"], parser, [*defaults, *others])
        chosen = {**found, **chosen}
    return SimpleNamespace(**{**copy.deepcopy(dict(defaults)), **chosen})


def read_settings(
    file: str, parser: argparse.ArgumentParser, others: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the settings of a YAML file, each checked as the option of its name is.

    Args:
        file: Its path.
        parser: The command's.
        others: Keys that the file may have besides the options.

    Raises:
        UserError: If there is no such file, it is not YAML, or it has other keys or values than
            there can be.
    """
    from mlx_rgemma.io.yaml import read_yaml

    path = Path(file).expanduser()
    values = {key.replace("-", "_"): value for key, value in read_yaml(path).items()}
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    check_keys(str(path), values, [*actions, *others])
    if values.pop("config", None) is not None:
        raise UserError(f"{path}: config: a file of settings cannot name another.")
    return {
        key: _checked(path, actions.get(key), key, value)
        for key, value in values.items()
        if value is not None
    }


def check_keys(where: str, values: Any, known: Collection[str]) -> None:
    """Refuse settings that there are not: a misspelt one would do nothing, and not say so.

    Args:
        where: What has them, for messages.
        values: A mapping.
        known: Its keys, at most.

    Raises:
        UserError: If it is no mapping, or has others.
    """
    if not isinstance(values, Mapping):
        expected = ", ".join(known)
        raise UserError(f"{where} is {shown(values)}, expected {expected}, each with its value.")
    unknown = [str(key) for key in values if key not in known]
    if unknown:
        similar = get_close_matches(unknown[0][:100], known, n=1)
        hint = f"did you mean {similar[0]}?" if similar else "--help lists them."
        if not similar and len(known) <= 6:
            hint = f"there are {', '.join(known)}."
        raise UserError(f"{where}: no such setting: {shortened(unknown)}; {hint}")


def _with_numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_numbers(inner) for inner in value]
    return float(value) if isinstance(value, str) and EXPONENT.fullmatch(value) else value


def _checked(path: Path, action: argparse.Action | None, key: str, value: Any) -> Any:
    """Return a value of the file, as the command line would have taken it."""

    def refuse(expected: str) -> UserError:
        return UserError(f"{path}: {key} is {shown(value)}, expected {expected}.")

    if action is None:
        return _with_numbers(value)
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise refuse("true or false")
        return value
    if action.nargs == "+":
        values = value if isinstance(value, list) else [value]
        if not values or not all(map(_is_text, values)):
            raise refuse("text, or a list of texts")
        return [str(one) for one in values]
    if callable(action.type):
        try:
            value = action.type(str(value))
        except (ValueError, OverflowError, argparse.ArgumentTypeError) as error:
            if not isinstance(error, argparse.ArgumentTypeError):
                kind = getattr(action.type, "__name__", "value")
                raise refuse(f"a {kind}") from error
            raise UserError(f"{path}: {key} is {shown(value)}: {str(error)[:200]}.") from error
    elif not _is_text(value):
        raise refuse("text")
    if action.choices is not None and value not in action.choices:
        raise refuse(f"one of {', '.join(map(str, action.choices))}")
    return value if callable(action.type) else str(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, (str, int, float)) and not isinstance(value, bool)
