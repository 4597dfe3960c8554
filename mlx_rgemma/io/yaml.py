"""YAML of plain values, bounded in size and depth: settings, and the metadata of model cards."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from mlx_rgemma.errors import UserError
from mlx_rgemma.io.reading import read_limited

MAX_BYTES = 200_000
MAX_DEPTH = 20
MAX_DIGITS = 400
"""Characters of a number."""


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping of a file; see `parse_yaml`.

    Raises:
        UserError: If the file is missing, too large, or holds anything else.
    """
    try:
        text = read_limited(path, MAX_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text.") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, path: str) -> dict[str, Any]:
    """Return a mapping of strings, finite numbers, booleans, and lists and mappings of these.

    Aliases are refused: a few of them expand a small file without bound.

    Args:
        text: The YAML.
        path: The beginning of a message.

    Raises:
        UserError: If the text holds anything else.
    """
    try:
        values = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark is not None else ""
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or "damaged"
        raise UserError(f"{path}: not a YAML file of settings ({where}{reason}).") from error
    except UserError:
        raise
    except (ValueError, OverflowError) as error:  # an escape of no character, "\UFFFFFFFF"
        raise UserError(f"{path}: not a YAML file of settings (an invalid escape).") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected lines of the form key: value.")
    return values


class _Loader(yaml.SafeLoader):
    """Loader of JSON values, which refuses expensive constructs."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _refusal("aliases (*) are not supported; write the value out", event)
        if event.tag is not None:
            raise _refusal("tags (!) are not supported", event)
        if self.depth == MAX_DEPTH:
            raise _refusal("nested too deeply", event)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def number(self, node: Any) -> int | float:
        text = node.value
        if len(text) > MAX_DIGITS:
            raise _refusal(f"a number of {len(text)} characters", node)
        if ":" in text:  # YAML 1.1 takes 1:30 for 90
            raise _refusal("a number with colons; quote it if it is text", node)
        whole = node.tag.endswith(":int")
        try:
            value = self.construct_yaml_int(node) if whole else self.construct_yaml_float(node)
        except ValueError:
            raise _refusal("not a number", node) from None
        if abs(value) >= 2**63 if whole else not math.isfinite(value):
            raise _refusal("a number out of range", node)
        return value

    def text(self, node: Any) -> str:
        value: str = node.value
        if "\0" in value or any("\ud800" <= c <= "\udfff" for c in value):
            raise _refusal("text with NUL or half of a surrogate pair", node)
        return value

    def mapping(self, node: Any) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise _refusal("a key that is not text", key_node)
            if key in values:
                raise _refusal("the same key twice", key_node)
            values[key] = self.construct_object(value_node, deep=True)
        return values

    def sequence(self, node: Any) -> list[Any]:
        return self.construct_sequence(node, deep=True)


def _refusal(problem: str, at: Any) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, at.start_mark)


_KINDS = {
    "null": yaml.SafeLoader.construct_yaml_null,
    "bool": yaml.SafeLoader.construct_yaml_bool,
    "str": _Loader.text,
    "int": _Loader.number,
    "float": _Loader.number,
    "seq": _Loader.sequence,
    "map": _Loader.mapping,
}
_Loader.yaml_constructors = {f"tag:yaml.org,2002:{kind}": make for kind, make in _KINDS.items()}
_Loader.yaml_implicit_resolvers = {  # dates, merge keys (<<) and "=" are text
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in _KINDS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
