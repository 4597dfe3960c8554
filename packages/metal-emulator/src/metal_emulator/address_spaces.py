"""Find pointers that change their address space, without a compiler.

C++ has no address spaces, so a C++ compiler accepts what Metal rejects. With clang, `type_check`
makes them part of the types. This module needs no clang: it reads the initialisers of pointers and
the arguments of function calls.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from .errors import Finding, finding
from .source import THREADGROUP_VARIABLE, split_arguments, strip_comments, without_instantiations

_SPACE = r"\b(device|constant|threadgroup|thread)\b"
_FUNCTION = re.compile(
    r"(?P<name>[A-Za-z_]\w*)\s*\((?P<parameters>(?:[^()]|\((?:[^()]|\([^()]*\))*\))*)\)\s*(?:const\s*)?\{"
)
_NOT_FUNCTIONS = {"if", "for", "while", "switch", "return", "sizeof", "decltype"}
_POINTER = re.compile(rf"{_SPACE}[^;(){{}}=]*?[*&]\s*(?:const\s+|restrict\s+)?(\w+)\s*=\s*([^;]*);")
_INFERRED = re.compile(r"\bauto\s*[*&]?\s*(\w+)\s*=\s*([^;]*);")
_LOCAL_ARRAY = re.compile(
    r"(?<=[;{}])\s*(?:const\s+)?[A-Za-z_]\w*(?:<[^;{}]*>)?\s+(\w+)\s*\[[^;=]*\]\s*[;=]"
)
# An expression with the address space of the name in it: p, p + 1, &p[1], p[1].
_REFERENCE = re.compile(
    r"\s*(?P<address>&?)\s*(?P<name>[A-Za-z_]\w*)\s*(?P<index>\[.*\])?\s*(?:[-+].*)?", re.S
)


class _Function(NamedTuple):
    name: str
    parameters: tuple[str, ...]  # as declared
    body: str
    position: int  # of the body in the text


class _Place(NamedTuple):
    space: str
    pointer: bool  # a pointer or array, whose name is an address


def space_changes(source: str) -> list[Finding]:
    """Return the pointers and references that change their address space."""
    text = without_instantiations(strip_comments(source))
    functions = list(_functions(text))
    helpers = {f.name: f for f in functions}
    found = []
    for function in functions:
        places = _places(function)
        for position, message in [
            *_wrong_initialisers(function, places),
            *_wrong_arguments(function, places, helpers),
        ]:
            line = text.count("\n", 0, function.position + position) + 1
            found.append(finding(message, line, source))
    return found


def _functions(text: str) -> Iterator[_Function]:
    for match in _FUNCTION.finditer(text):
        if match["name"] in _NOT_FUNCTIONS:
            continue
        start = match.end() - 1
        depth = 0
        for position in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                parameters = tuple(split_arguments(match["parameters"]))
                yield _Function(match["name"], parameters, text[start:position], start)
                break


def _places(function: _Function) -> dict[str, _Place]:
    """Return the address spaces of the names in a function, where they are known."""
    places: dict[str, _Place] = {}
    for declaration in function.parameters:
        plain = re.sub(r"\[\[.*?\]\]", "", declaration)
        space = re.search(_SPACE, plain)
        names = re.findall(r"\w+", re.sub(r"\[[^\]]*\]\s*$", "", plain))
        if space and names and re.search(r"[*&\[]", plain):
            places[names[-1]] = _Place(space.group(1), "&" not in plain)
    for match in THREADGROUP_VARIABLE.finditer(function.body):
        for declarator in split_arguments(match["declarators"]):
            name = re.findall(r"\w+", declarator)[0]
            places[name] = _Place("threadgroup", "[" in declarator)
    for match in _LOCAL_ARRAY.finditer(function.body):
        places.setdefault(match.group(1), _Place("thread", True))
    for match in _POINTER.finditer(function.body):
        places[match.group(2)] = _Place(match.group(1), True)
    for match in _INFERRED.finditer(function.body):
        place = _address(match.group(2), places)
        if place is not None:
            places[match.group(1)] = _Place(place, True)
    return places


def _address(expression: str, places: dict[str, _Place]) -> str | None:
    """Return the address space that an expression points to, if known."""
    match = _REFERENCE.fullmatch(expression)
    if match is None or match["name"] not in places:
        return None
    place = places[match["name"]]
    points = bool(match["address"]) or (place.pointer and not match["index"])
    return place.space if points else None


def _wrong_initialisers(
    function: _Function, places: dict[str, _Place]
) -> Iterator[tuple[int, str]]:
    for match in _POINTER.finditer(function.body):
        declared, name, value = match.groups()
        actual = _address(value, places) or _space_of_value(value, places, match.group())
        if actual is not None and actual != declared:
            yield (
                match.start(),
                f"{declared} pointer '{name}' is initialised with a {actual} pointer",
            )


def _space_of_value(value: str, places: dict[str, _Place], declaration: str) -> str | None:
    """Return the address space of the initialiser of a reference, if known."""
    match = _REFERENCE.fullmatch(value)
    if match is None or "&" not in declaration.split("=")[0] or match["name"] not in places:
        return None
    return places[match["name"]].space if match["index"] else None


def _wrong_arguments(
    function: _Function, places: dict[str, _Place], helpers: dict[str, _Function]
) -> Iterator[tuple[int, str]]:
    for name, helper in helpers.items():
        for call in re.finditer(rf"(?<![\w.:]){name}\s*\(", function.body):
            arguments = split_arguments(_until_closed(function.body, call.end()))
            for parameter, argument in zip(helper.parameters, arguments, strict=False):
                space = re.search(_SPACE, parameter)
                actual = _address(argument, places)
                if space is None or "*" not in parameter or actual is None:
                    continue
                if actual != space.group(1):
                    message = (
                        f"'{argument.strip()}' is {actual} memory, '{name}' takes {space.group(1)}"
                    )
                    yield call.start(), message


def _until_closed(text: str, start: int) -> str:
    depth = 1
    for position in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[position], 0)
        if depth == 0:
            return text[start:position]
    return text[start:]
