"""Seeded damage to JSON values, texts and bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from random import Random
from typing import Any


class Raw(str):
    """JSON text that is written as it is, for numbers and nesting that `json` cannot make."""


class Pairs(list[tuple[str, Any]]):
    """An object as key-value pairs, so that a key can stand twice."""


def dumps(value: Any) -> str:
    """Return JSON text; `Raw` and `Pairs` are understood, NaN and infinities allowed."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict | Pairs):
        items = value.items() if isinstance(value, dict) else value
        return "{" + ", ".join(f"{json.dumps(k)}: {dumps(v)}" for k, v in items) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(dumps, value)) + "]"
    return json.dumps(value)


WHOLE = (0, 1, -1, 2, 3, 7, 255, 2**31 - 1, 2**31, 2**32, 2**40, 2**53, 2**63 - 1, 2**63, 2**64)
"""Whole numbers at the bounds of types. None lies between 300 and 2**31: a state or model of such
a size is a legitimate request, and may take the gigabyte that counts as a failure."""

NUMBERS: tuple[Any, ...] = (
    *WHOLE,
    -(2**31),
    -(2**63),
    10**30,
    Raw("9" * 5000),
    0.5,
    1.5,
    -0.0,
    1e-45,
    1e39,
    1e308,
    Raw("1e999"),
    Raw("-1e999"),
    Raw("NaN"),
    Raw("Infinity"),
)
TEXTS: tuple[Any, ...] = (
    "",
    " ",
    "a",
    "1",
    "-1",
    "true",
    "none",
    "float32",
    "\0",
    "a\nb\r\nc",
    "\x1b[2J\x1b]0;owned\a",
    "\u202e\u200b\ufeff",
    "é漢😀",
    Raw('"\\ud800"'),
    "x" * 20_000,
    "../../../escaped",
    "/dev/zero",
    "%s%n{0}{{ 7 * 7 }}",
    "__import__('os').getpid()",
)
DEEP = 50_000
OTHERS: tuple[Any, ...] = (
    None,
    True,
    False,
    [],
    {},
    [[]],
    [None],
    {"": 0},
    [1] * 10_000,
    [1.5, "a", None, {}],
    {"a": {"b": {"c": []}}},
    Raw("[" * DEEP + "]" * DEEP),
    Raw('{"a":' * DEEP + "1" + "}" * DEEP),
    Raw("[" * 900 + "]" * 900),
)
NASTY: tuple[Any, ...] = (*NUMBERS, *TEXTS, *OTHERS)


def nasty(rng: Random) -> Any:
    """Return one of the values that break careless readers."""
    return rng.choice(rng.choice((NUMBERS, NUMBERS, TEXTS, OTHERS)))


def brief(value: Any) -> str:
    """Return a short form of a value, for the description of a case."""
    text = str(value) if isinstance(value, Raw) else repr(value)
    return text if len(text) <= 60 else f"{text[:50]}... ({len(text)} characters)"


def mutate_json(rng: Random, value: Any, keys: tuple[str, ...] = ()) -> tuple[Any, str]:
    """Damage one to three places of a JSON value.

    Args:
        rng: Decides what is done.
        value: The sound value; it is copied.
        keys: More keys that may be added at the top, with nasty values.

    Returns:
        The damaged value, and a description.
    """
    value, notes = json.loads(json.dumps(value)), []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if keys and isinstance(value, dict) and rng.random() < 0.25:
            key, new = rng.choice(keys), nasty(rng)
            value[key] = new
            notes.append(f"{key} = {brief(new)}")
            continue
        value, note = _mutate_once(rng, value)
        notes.append(note)
    return value, "; ".join(notes)


def _mutate_once(rng: Random, root: Any) -> tuple[Any, str]:
    places = list(_places(root))
    if not places:
        new = nasty(rng)
        return new, f"all = {brief(new)}"
    path = rng.choice(places)
    if rng.random() < 0.5:  # shallow places matter most, deep ones are many
        path = path[: rng.randrange(1, len(path) + 1)]
    holder = root
    for key in path[:-1]:
        holder = holder[key]
    last, where = path[-1], ".".join(map(str, path))[-60:]
    old = holder[last]
    action = rng.randrange(10)
    if action == 0:
        del holder[last]
        return root, f"{where} removed"
    if action == 1 and isinstance(holder, dict):
        name = rng.choice(TEXTS[:-1])
        holder[str(name)] = holder.pop(last)
        return root, f"{where} renamed to {brief(name)}"
    if action == 2 and isinstance(old, dict) and old:
        pairs = Pairs([*old.items(), rng.choice(list(old.items()))])
        holder[last] = pairs
        return root, f"{where} has a key twice"
    if action == 3:
        holder[last] = rng.choice(([old], {"a": old}, [old, old]))
        return root, f"{where} wrapped"
    if action == 4:
        other = root
        for key in rng.choice(places):
            other = other[key]
        if not _holds(other, holder):
            holder[last] = other
            return root, f"{where} copied from elsewhere"
    if action < 8 and isinstance(old, int | float) and not isinstance(old, bool):
        new = rng.choice(
            (old + 1, old - 1, -old, old * 2, old + 0.5, float(old), str(old), ~int(old))
        )
    else:
        new = nasty(rng)
    holder[last] = new
    return root, f"{where} = {brief(new)}"


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, Raw | Pairs) or len(path) > 20:
        return
    if isinstance(value, dict):
        items: Any = value.items()
    elif isinstance(value, list):
        items = enumerate(value[:50])
    else:
        return
    for key, inner in items:
        yield (*path, key)
        yield from _places(inner, (*path, key))


def _holds(value: Any, part: Any) -> bool:
    """Return whether `part` is inside of `value`: copied there, it would hold itself."""
    if value is part:
        return True
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(_holds(v, part) for v in inner)


def mutate_bytes(rng: Random, content: bytes, region: int | None = None) -> tuple[bytes, str]:
    """Damage bytes in one to four places.

    Args:
        rng: Decides what is done.
        content: The sound bytes.
        region: The first so many bytes are damaged; by default all.

    Returns:
        The damaged bytes, and a description.
    """
    data, notes = bytearray(content), []
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        limit = max(1, min(len(data), region or len(data)))
        at = rng.randrange(limit)
        size = rng.choice((1, 2, 4, 8, 64, 1000))
        action = rng.choice(
            ("flip", "flip", "number", "number", "cut", "repeat", "zero", "move", "text", "end")
        )
        if action == "flip":
            if data:
                data[at] ^= 1 << rng.randrange(8)
        elif action == "number":
            number, width = rng.choice(WHOLE), rng.choice((1, 2, 4, 8))
            order = rng.choice(("little", "big"))
            data[at : at + width] = (number % (1 << 8 * width)).to_bytes(width, order)  # type: ignore[arg-type]
        elif action == "cut":
            del data[at : at + size]
        elif action == "repeat":
            data[at:at] = data[at : at + size] * rng.choice((1, 1, 3))
        elif action == "zero":
            data[at : at + size] = bytes(min(size, len(data) - at))
        elif action == "move":
            start = rng.randrange(limit)
            data[at : at + size] = data[start : start + size]
        elif action == "text":
            data[at : at + 8] = rng.choice(
                (b"9" * 8, b"\xff" * 8, b'"-1[{}],', b"null,nul", b"\x1b[2J\r\n\0\0")
            )
        elif rng.random() < 0.7:
            del data[at:]
        else:
            data += bytes(rng.randrange(256) for _ in range(size))
        notes.append(f"{action} at {at}")
    return bytes(data), ", ".join(notes)


def mutate_text(rng: Random, text: str, tokens: tuple[str, ...] = ()) -> tuple[str, str]:
    """Damage a text: pieces removed, repeated, swapped, or replaced by `tokens` of its language."""
    notes = []
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(text) + 1)
        end = min(len(text), at + rng.choice((1, 3, 10, 40)))
        action = rng.choice(("cut", "repeat", "token", "token", "nasty"))
        piece = {
            "cut": "",
            "repeat": text[at:end] * rng.choice((2, 2, 50)),
            "token": rng.choice(tokens or ("\0",)),
            "nasty": str(rng.choice(TEXTS)),
        }[action]
        text = text[:at] + piece + (text[at:] if action == "token" else text[end:])
        notes.append(f"{action} at {at}")
    return text, ", ".join(notes)
