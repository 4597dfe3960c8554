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

from mlx_rgemma.errors import UserError

EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
"""Numbers like 1e-5, which YAML takes for text."""


def complete(
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
        UserError: If there is no such file, it is not YAML, or it has other keys or values than
            there can be.
    """
    chosen = {key: value for key, value in given.items() if value is not None}
    if given.get("config") is not None:
        path = Path(given["config"]).expanduser()
        values = {key.replace("-", "_"): value for key, value in _read(path).items()}
        check_keys(str(path), values, [*defaults, *others])
        actions = {action.dest: action for action in parser._actions}
        for key, value in values.items():
            if key not in chosen and value is not None:
                chosen[key] = _checked(path, actions.get(key), key, value)
    return SimpleNamespace(**{**copy.deepcopy(dict(defaults)), **chosen})


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
        raise UserError(f"{where} is {values!r}, expected {', '.join(known)}, each with its value.")
    unknown = [str(key) for key in values if key not in known]
    if unknown:
        similar = get_close_matches(unknown[0], known, n=1)
        hint = f"did you mean {similar[0]}?" if similar else "--help lists them."
        if not similar and len(known) <= 6:
            hint = f"there are {', '.join(known)}."
        raise UserError(f"{where}: no such setting: {', '.join(unknown)}; {hint}")


def _read(path: Path) -> dict[str, Any]:
    import yaml  # type: ignore[import-untyped]

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark is not None else ""
        raise UserError(f"{path}: not a YAML file{where}.") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{path}: expected lines of the form key: value.")
    numbers: dict[str, Any] = _with_numbers(values)
    return numbers


def _with_numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_numbers(inner) for inner in value]
    return float(value) if isinstance(value, str) and EXPONENT.fullmatch(value) else value


def _checked(path: Path, action: argparse.Action | None, key: str, value: Any) -> Any:
    """A value of the file, as the command line would have taken it."""
    if action is None:
        return value
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UserError(f"{path}: {key} is {value!r}, expected true or false.")
        return value
    if action.type is None and isinstance(value, (bool, list, Mapping)):
        raise UserError(f"{path}: {key} is {value!r}, expected text.")
    if action.type is None and action.choices is None:
        return str(value)
    if callable(action.type):
        try:
            value = action.type(str(value))
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise UserError(f"{path}: {key} is {value!r}: {error}.") from error
    if action.choices is not None and value not in action.choices:
        choices = ", ".join(map(str, action.choices))
        raise UserError(f"{path}: {key} is {value!r}, expected one of {choices}.")
    return value
