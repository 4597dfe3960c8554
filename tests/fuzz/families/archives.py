"""Tar archives, and the folders of Orbax."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random

from fuzz.families.models import GOLDEN, convert
from fuzz.families.pickles import SAID
from fuzz.job import Box, Family, Job
from fuzz.mutations import brief, dumps, mutate_bytes, mutate_json

FLAX = GOLDEN / "tiny-2b-flax"
FOLDERS = tuple(path for path in sorted(FLAX.iterdir()) if path.is_dir())
BLOCK = 512
GIGABYTE = 1 << 30


def _tar(box: Box, rng: Random) -> Job:
    zipped = rng.random() < 0.4
    path = box.inputs / ("x.tar.gz" if zipped else "x.tar")
    raw = io.BytesIO()
    kind = rng.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT))
    notes = []
    with tarfile.open(fileobj=raw, mode="w", format=kind) as archive:
        members = sorted((GOLDEN / "tiny-2b").iterdir())
        odd = rng.randrange(len(members) + 1) if rng.random() < 0.6 else -1
        for number, member in enumerate(members):
            if number == odd:
                notes.append(_add_odd(rng, archive))
            archive.add(member, f"a/{member.name}")
        if odd == len(members):
            notes.append(_add_odd(rng, archive))
    content = raw.getvalue()
    if not notes or rng.random() < 0.2:
        if rng.random() < 0.6:
            content, note = _damage_header(rng, content)
        else:
            content, note = mutate_bytes(rng, content)
        notes.append(note)
    if zipped:
        content = gzip.compress(content, 1)
        if rng.random() < 0.4:
            content, note = mutate_bytes(rng, content, rng.choice((20, None)))
            notes.append(f"gzip: {note}")
    path.write_bytes(content)
    return convert(box, path, "; ".join(notes))


NAMES = (
    "../escaped",
    "a/../../escaped",
    "/etc/escaped",
    "a/config.json",
    "A/CONFIG.JSON",
    "./a//config.json",
    "a",
    "",
    ".",
    "/",
    "a\\..\\b",
    "x" * 5000,
    "d/" * 1500 + "x",
    "a/\x1b[2Jb\nc",
    "a/\u202eb",
    "a/\udcff",
    "a/model.safetensors.index.json",
    "a/second/config.json",
    "a/x.tar",
)
KINDS = tuple(bytes([c]) for c in b"01234567gxLKSVMDNAX?\0")


def _add_odd(rng: Random, archive: tarfile.TarFile) -> str:
    member = tarfile.TarInfo("a/odd")
    field = rng.choice(("name", "name", "kind", "kind", "size", "pax", "mode", "many"))
    content = b"x" * rng.choice((0, 1, 511, 512, 513))
    member.size = len(content)
    if field == "name":
        member.name = rng.choice(NAMES)
    elif field == "kind":
        member.type = rng.choice(KINDS)
        member.linkname = rng.choice(("", "/etc/passwd", "../../escaped", "a/config.json", "a"))
    elif field == "size":
        member.size = rng.choice((1, 2**33 - 1, 2**40, 2**62))
    elif field == "pax":
        key = rng.choice(
            (
                "path",
                "linkpath",
                "size",
                "mtime",
                "hdrcharset",
                "GNU.sparse.major",
                "GNU.sparse.map",
                "comment",
                "uid",
            )
        )
        value = rng.choice(
            (
                "",
                "-1",
                "9" * 300,
                "nan",
                "../escaped",
                "x" * 100_000,
                "1",
                "BINARY",
                "0,9999999999999",
            )
        )
        member.pax_headers = {key: value}
    elif field == "mode":
        member.mode = rng.choice((0, 0o7777))
    else:
        for number in range(3000):
            archive.addfile(tarfile.TarInfo(f"a/many/{number}"))
    try:
        archive.addfile(member, io.BytesIO(content.ljust(min(member.size, 1000), b"x")))
    except (OSError, ValueError):
        return f"nothing odd: {field} is not written by tarfile"
    return (
        f"{field}: {brief(member.name)} {member.type!r} {member.size} {brief(member.pax_headers)}"
    )


FIELDS = {
    "name": (0, 100),
    "mode": (100, 8),
    "size": (124, 12),
    "mtime": (136, 12),
    "type": (156, 1),
    "link": (157, 100),
    "magic": (257, 8),
    "prefix": (345, 155),
}
FILLS = (
    b"\xff",
    b"7",
    b"9",
    b"-1",
    b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff",
    b"\0",
    b" ",
    b"L",
    b"x",
    b"S",
)


def _damage_header(rng: Random, content: bytes) -> tuple[bytes, str]:
    """Overwrite a field of a member's header, and renew its checksum."""
    starts = [
        at
        for at in range(0, len(content) - BLOCK, BLOCK)
        if content[at + 257 : at + 262] == b"ustar"
    ]
    data = bytearray(content)
    at = rng.choice(starts)
    name, (offset, width) = rng.choice(list(FIELDS.items()))
    fill = rng.choice(FILLS)
    value = (fill if name in ("type", "size") or rng.random() < 0.5 else fill * width)[:width]
    data[at + offset : at + offset + len(value)] = value
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + BLOCK])
    return bytes(data), f"{name} at {at} = {brief(value)}"


def _orbax(box: Box, rng: Random) -> Job:
    name = rng.choice(FOLDERS).name
    folder = box.inputs / "flax"
    _copy_tree(FLAX / name, folder)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    small = [path for path in paths if path.name[0] in "._m"]
    path = rng.choice(small if small and rng.random() < 0.6 else paths)
    where = str(path.relative_to(folder))
    action = rng.choice(
        ("json", "json", "bytes", "bytes", "remove", "link", "folder", "pipe", "swap")
    )
    note = action
    if action == "json":
        chosen = path if path.read_bytes()[:1] == b"{" else rng.choice(paths)
        note = _damage_json(rng, chosen)
    elif action == "bytes":
        content, note = mutate_bytes(rng, path.read_bytes())
        path.write_bytes(content)
    elif action == "swap":
        other = rng.choice(paths)
        content = path.read_bytes()
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)
    else:
        path.unlink()
        if action == "link":
            path.symlink_to(rng.choice(("/dev/zero", "/etc/passwd", "/", "nowhere", path.name)))
        elif action == "folder":
            path.mkdir()
        elif action == "pipe":
            os.mkfifo(path)
    return convert(box, folder, f"{name}/{where}: {note}", *SAID)


def _damage_json(rng: Random, path: Path) -> str:
    try:
        value = json.loads(path.read_bytes())
    except ValueError:
        content, note = mutate_bytes(rng, path.read_bytes())
        path.write_bytes(content)
        return note
    keys = (
        "shape",
        "chunks",
        "dtype",
        "compressor",
        "filters",
        "order",
        "fill_value",
        "zarr_format",
    )
    value, note = mutate_json(rng, value, keys if path.name == ".zarray" else ())
    path.write_bytes(dumps(value).encode("utf-8", "surrogatepass"))
    return note


def _copy_tree(source: Path, target: Path) -> None:
    for path in [source, *sorted(source.rglob("*"))]:
        place = target / path.relative_to(source)
        if path.is_dir():
            place.mkdir()
        else:
            place.write_bytes(path.read_bytes())


def _sound_tar(box: Box, rng: Random) -> Job:
    with tarfile.open(box.inputs / "x.tar.gz", "w:gz") as archive:
        archive.add(GOLDEN / "tiny-2b", "a")
    return convert(box, box.inputs / "x.tar.gz", "")


def _sound_flax(path: Path) -> Callable[[Box, Random], Job]:
    return lambda box, rng: convert(box, path, "", *SAID)


def _header(name: str, kind: bytes, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT)


def _long_name(box: Box, rng: Random) -> Job:
    """Return an archive with a GNU long name of 6 GB, a sparse file on disk."""
    path = box.inputs / "x.tar"
    with path.open("wb") as file:
        file.write(_header("././@LongLink", b"L", 6 * GIGABYTE))
        file.seek(6 * GIGABYTE, os.SEEK_CUR)
        file.write(_header("a/config.json", b"0", 0) + bytes(2 * BLOCK))
    return convert(box, path, "a GNU long name of 6 GB")


def _large_pax(box: Box, rng: Random) -> Job:
    """Return an archive with a pax header of 300 MB."""
    path, size = box.inputs / "x.tar", 300_000_000
    record = f"{size} comment=".encode()
    with path.open("wb") as file:
        file.write(_header("pax", b"x", size) + record)
        file.seek(size - len(record) - 1, os.SEEK_CUR)
        file.write(b"\n" + bytes(-size % BLOCK))
        file.write(_header("a/config.json", b"0", 0) + bytes(2 * BLOCK))
    return convert(box, path, "a pax header of 300 MB")


def _many_pax_records(box: Box, rng: Random) -> Job:
    """Return an archive with a pax header of a million small records."""
    content = b"".join(b"20 k%07d=aaaaaaaa\n" % i for i in range(1_000_000))
    raw = _header("pax", b"x", len(content)) + content + bytes(-len(content) % BLOCK)
    (box.inputs / "x.tar").write_bytes(raw + _header("a/config.json", b"0", 0) + bytes(2 * BLOCK))
    return convert(box, box.inputs / "x.tar", "a million pax records")


def _zeros(box: Box, rng: Random) -> Job:
    """Return 10 GB of zeros under a name that is refused, as a small tar.gz."""
    size = 10 * GIGABYTE
    piece = gzip.compress(bytes(64 << 20))
    with (box.inputs / "x.tar.gz").open("wb") as file:
        file.write(gzip.compress(_header("../escaped", b"0", size)))
        for _ in range(size // (64 << 20)):
            file.write(piece)
        file.write(gzip.compress(bytes(2 * BLOCK)))
    return convert(box, box.inputs / "x.tar.gz", "10 GB of zeros, and a name that leads out")


def _zeros_elsewhere(box: Box, rng: Random) -> Job:
    """Return 10 GB of zeros that belong to no model."""
    size = 10 * GIGABYTE
    piece = gzip.compress(bytes(64 << 20))
    with (box.inputs / "x.tar.gz").open("wb") as file:
        file.write(gzip.compress(_header("a/zeros.bin", b"0", size)))
        for _ in range(size // (64 << 20)):
            file.write(piece)
        file.write(gzip.compress(_header("../escaped", b"0", 0) + bytes(2 * BLOCK)))
    return convert(box, box.inputs / "x.tar.gz", "10 GB of zeros, then a name that leads out")


def _many_members(box: Box, rng: Random) -> Job:
    """Return an archive of 100,000 empty files."""
    raw = b"".join(_header(f"a/{i}", b"0", 0) for i in range(100_000)) + bytes(2 * BLOCK)
    (box.inputs / "x.tar.gz").write_bytes(gzip.compress(raw, 1))
    return convert(box, box.inputs / "x.tar.gz", "100,000 members")


def _recursive_gzip(box: Box, rng: Random) -> Job:
    """Return a gzip stream with a file name in its header that never ends."""
    header = b"\x1f\x8b\x08\x08" + bytes(6) + b"x" * 50_000_000
    (box.inputs / "x.tar.gz").write_bytes(header + zlib.compress(b""))
    return convert(box, box.inputs / "x.tar.gz", "a gzip name of 50 MB")


def _linked_array(box: Box, rng: Random) -> Job:
    """Return a zarr folder with an array that is a link to a place elsewhere."""
    folder = box.inputs / "flax"
    _copy_tree(FLAX / "orbax-0.5.9-zarr", folder)
    array = folder / "final_norm.scale"
    array.rename(box.inputs / "elsewhere")
    array.symlink_to(box.inputs / "elsewhere")
    return convert(box, folder, "an array is a link to elsewhere", *SAID)


def _circle(box: Box, rng: Random) -> Job:
    """Return a folder with a file that is a link to itself."""
    folder = box.inputs / "flax"
    _copy_tree(FLAX / "orbax-0.5.9-ocdbt", folder)
    (folder / "_sharding").unlink()
    (folder / "_sharding").symlink_to("_sharding")
    return convert(box, folder, "a link to itself", *SAID)


FAMILIES = (
    Family(
        "tar",
        "command",
        {"sound": _sound_tar},
        _tar,
        {
            "a long name of 6 GB": _long_name,
            "a pax header of 300 MB": _large_pax,
            "a million pax records": _many_pax_records,
            "10 GB of zeros": _zeros,
            "10 GB of zeros elsewhere": _zeros_elsewhere,
            "100,000 members": _many_members,
            "a long gzip name": _recursive_gzip,
        },
    ),
    Family(
        "orbax",
        "command",
        {f"sound {path.name}": _sound_flax(path) for path in FOLDERS},
        _orbax,
        {"a linked array": _linked_array, "a link to itself": _circle},
        needs="tensorstore",
    ),
)
