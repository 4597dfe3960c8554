"""PyTorch files: the zip archive and the pickle in it."""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from random import Random

from fuzz.families.models import GOLDEN, convert
from fuzz.job import Box, Family, Job
from fuzz.mutations import WHOLE, mutate_bytes
from fuzz.payloads import files

TORCH = GOLDEN / "tiny-2b-pytorch" / "tiny-2b.pt"
SAID = (
    *("--attention-window-size", "16", "--logits-soft-cap", "30"),
    "--embeddings-scale",
)

OPCODES = (
    b"cos\nsystem\n(X\x04\x00\x00\x00true\x85R",
    b"cbuiltins\neval\n(X\x01\x00\x00\x001tR",
    b"\x8c\x02os\x8c\x06system\x93",
    b"ctorch\nload\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n)R",
    b"ccollections\nOrderedDict\n)R",
    b"ccollections\nOrderedDict\n(]tR",
    b"}",
    b"]",
    b")",
    b"(",
    b"0",
    b"1",
    b"2",
    b"N",
    b"K\x01",
    b"J\xff\xff\xff\x7f",
    b"J\x00\x00\x00\x80",
    b"G\x7f\xf8\x00\x00\x00\x00\x00\x00",
    b"I" + b"9" * 5000 + b"\n",
    b"L" + b"9" * 5000 + b"L\n",
    b"\x8a\xff" + b"\xff" * 255,
    b"\x8b\xff\xff\xff\x7f",
    b"X\xff\xff\xff\xff",
    b"X\x03\x00\x00\x00\xed\xa0\x80",
    b"B\xff\xff\xff\x7f",
    b"\x8d" + b"\xff" * 8,
    b"\x8e" + b"\xff" * 7 + b"\x7f",
    b"\x96" + b"\xff" * 6 + b"\x0f\x00",
    b"r\xff\xff\xff\x1f",
    b"r\xff\xff\xff\xff",
    b"p99999999999\n",
    b"j\xff\xff\xff\x1f",
    b"q\xff",
    b"h\xff",
    b"\x94",
    b"\x85" * 2000,
    b"]" * 2000,
    b"(" * 20_000,
    b"a",
    b"e",
    b"s",
    b"u",
    b"t",
    b"R",
    b"b",
    b"\x81",
    b"\x92",
    b"o",
    b"Q",
    b"P0\n",
    b"i__main__\nx\n",
    b"\x82\x01",
    b"\x97",
    b"\x98",
    b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"\x80\x05",
    b"\x80\xff",
    b".",
)


def _entries() -> dict[str, bytes]:
    with zipfile.ZipFile(TORCH) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _write(path: Path, entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def _torch(box: Box, rng: Random) -> Job:
    path = box.inputs / "x.pt"
    action = rng.choice(
        ("bytes", "directory", "entry", "pickle", "pickle", "opcodes", "opcodes", "opcodes")
    )
    if action == "bytes":
        content, note = mutate_bytes(rng, TORCH.read_bytes())
        path.write_bytes(content)
    elif action == "directory":
        content = TORCH.read_bytes()
        start = content.index(b"PK\x01\x02")
        if rng.random() < 0.3:
            start = len(content) - 98  # the end records
        directory, note = mutate_bytes(rng, content[start:])
        path.write_bytes(content[:start] + directory)
    else:
        entries = _entries()
        name = next(n for n in entries if n.endswith("data.pkl"))
        if action == "entry":
            note = _damage_entry(rng, entries)
        elif action == "pickle":
            entries[name], note = mutate_bytes(rng, entries[name])
        else:
            entries[name], note = _damage_opcodes(rng, entries[name])
        _write(path, entries, rng.choice((zipfile.ZIP_STORED,) * 19 + (zipfile.ZIP_DEFLATED,)))
    return convert(box, path, f"{action}: {note}", *SAID)


def _damage_entry(rng: Random, entries: dict[str, bytes]) -> str:
    name = rng.choice(list(entries))
    action = rng.choice(("remove", "rename", "cut", "grow", "byteorder", "more"))
    if action == "remove":
        del entries[name]
    elif action == "rename":
        new = rng.choice(
            ("../../escaped", "/etc/x", "a\0b", "x" * 20_000, "\x1b[2J", "data.pkl", name + "/")
        )
        entries[new] = entries.pop(name)
    elif action == "cut":
        entries[name] = entries[name][: rng.randrange(len(entries[name]) + 1)]
    elif action == "grow":
        entries[name] += bytes(rng.choice((1, 100, 100_000)))
    elif action == "byteorder":
        entries[name.split("/")[0] + "/byteorder"] = rng.choice(
            (b"big", b"", b"\xff" * 50, b"little\n")
        )
    else:
        for number in range(rng.choice((1, 20_000))):
            entries[f"more/{number}"] = b""
    return f"{action} {name[-40:]}"


def _damage_opcodes(rng: Random, content: bytes) -> tuple[bytes, str]:
    """Remove, repeat, move or insert whole opcodes, or change their arguments."""
    ends = [pos for _, _, pos in pickletools.genops(content)] + [len(content)]
    parts = [content[a:b] for a, b in pairwise(ends)]
    notes = []
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(min(len(parts), rng.choice((20, 200, len(parts)))))
        action = rng.choice(("cut", "repeat", "move", "insert", "insert", "insert", "number"))
        if action == "cut":
            del parts[at]
        elif action == "repeat":
            parts[at:at] = [parts[at]] * rng.choice((1, 3, 1000))
        elif action == "move":
            parts.insert(rng.randrange(len(parts)), parts.pop(at))
        elif action == "insert":
            parts.insert(at, rng.choice(OPCODES))
        elif parts[at][:1] in (b"K", b"M", b"J", b"\x8a"):
            parts[at] = pickle.dumps(rng.choice(WHOLE), 2)[2:-1]
        notes.append(f"{action} at {at}")
    return b"".join(parts), ", ".join(notes)


def _with_pickle(content: bytes) -> Callable[[Box, Random], Job]:
    def make(box: Box, rng: Random) -> Job:
        path = box.inputs / "x.pt"
        _write(path, {"x/data.pkl": content, "x/byteorder": b"little", "x/data/0": bytes(96)})
        return convert(box, path, f"a pickle of {len(content)} bytes", *SAID)

    return make


def _laughs(pieces: bytes) -> bytes:
    """Return a pickle with a dictionary key of tuples of tuples, 2^60 when counted out."""
    levels = b"".join(
        b"0h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(60)
    )
    return b"\x80\x02}" + pieces + b")q\x00" + levels + b"K\x01s."


def _zip_of_names(box: Box, rng: Random) -> Job:
    """Return a zip archive whose directory says that it has more than it has."""
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02}.")
    content = bytearray(raw.getvalue())
    at = content.rindex(b"PK\x05\x06")
    content[at + 8 : at + 20] = struct.pack("<HHII", 65535, 65535, 2**32 - 2, 0)
    (box.inputs / "x.pt").write_bytes(content)
    return convert(box, box.inputs / "x.pt", "a directory of 4 GB", *SAID)


PAYLOADS = {
    "tuples 2^60 as key": _with_pickle(_laughs(b"")),
    "tuples 2^60 as value": _with_pickle(_laughs(b"X\x01\x00\x00\x00x")),
    "500,000 nested tuples as key": _with_pickle(b"\x80\x02})" + b"\x85" * 500_000 + b"K\x01s."),
    "500,000 nested lists": _with_pickle(b"\x80\x02" + b"]" * 500_000 + b"a" * 499_999 + b"."),
    "500,000 nested dictionaries": _with_pickle(
        b"\x80\x02" + b"}K\x01" * 500_000 + b"N" + b"s" * 500_000 + b"."
    ),
    "2^62 bytes": _with_pickle(b"\x80\x05\x8e" + b"\xff" * 7 + b"\x3f."),
    "a directory of 4 GB": _zip_of_names,
}

FAMILIES = (
    Family(
        "torch",
        "command",
        {"sound": lambda box, rng: convert(box, TORCH, "", *SAID)},
        _torch,
        {
            **PAYLOADS,
            **{name: _with_pickle(content) for name, content in files("torch").items()},
        },
    ),
)
