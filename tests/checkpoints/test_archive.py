"""Archives: unpacked whole and inside of their folder, or refused."""

from __future__ import annotations

import gzip
import io
import shutil
import tarfile
import tracemalloc
from collections import namedtuple
from pathlib import Path

import pytest
from helpers.checkpoint_files import all_tensors, assert_same_tensors
from helpers.google_files import FLAX, SAID, TORCH, needs_tensorstore, tar_of
from helpers.models import GOLDEN

from mlx_rgemma import convert
from mlx_rgemma.checkpoints.formats import archive as archive_module
from mlx_rgemma.checkpoints.formats.archive import unpack
from mlx_rgemma.errors import CheckpointError
from mlx_rgemma.io.hub import EMBEDDED

FLAX_FOLDER = FLAX["orbax-0.5.9-zarr"]
CONTENTS = {
    "pt": (TORCH, TORCH, SAID),
    "hugging face": (GOLDEN / "tiny-2b", GOLDEN / "tiny-2b", {}),
    "flax": (FLAX_FOLDER, FLAX_FOLDER, SAID),
}


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=needs_tensorstore if n == "flax" else ()) for n in CONTENTS]
)
def test_the_same_as_unpacked(tmp_path, name, mode):
    source, member, options = CONTENTS[name]
    archive = tar_of(tmp_path / "archive", member, name="a folder", mode=mode)
    made = convert(archive, tmp_path / "new" / "one", **options)
    convert(source, tmp_path / "two", **options)
    assert_same_tensors(all_tensors(tmp_path / "new" / "one"), all_tensors(tmp_path / "two"))
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"one"}
    assert made.nbytes == sum(value.nbytes for value in all_tensors(tmp_path / "two").values())


def test_members_at_the_top_and_in_a_folder_that_holds_an_archive(tmp_path):
    (tmp_path / "source").mkdir()
    members = sorted((GOLDEN / "tiny-2b").iterdir())
    tar_of(tmp_path / "source" / "download.tar.gz", *members)
    convert(tmp_path / "source", tmp_path / "out")
    convert(GOLDEN / "tiny-2b", tmp_path / "two")
    assert_same_tensors(all_tensors(tmp_path / "out"), all_tensors(tmp_path / "two"))


def archive_of(path: Path, **fields) -> Path:
    """An archive of one sound file and one member as it should not be."""
    with tarfile.open(path, "w") as archive:
        sound = tarfile.TarInfo("sound")
        sound.size = 3
        archive.addfile(sound, io.BytesIO(b"abc"))
        member = tarfile.TarInfo("x")
        for name, value in fields.items():
            setattr(member, name, value)
        archive.addfile(member, io.BytesIO(b"x" * member.size))
    return path


ESCAPES = {
    "above": {"name": "../escaped"},
    "deep above": {"name": "a/b/../../../escaped"},
    "absolute": {"name": "/{}/escaped"},
    "symbolic link": {"type": tarfile.SYMTYPE, "linkname": "/etc"},
    "link inside": {"type": tarfile.SYMTYPE, "linkname": "sound"},
    "hard link": {"type": tarfile.LNKTYPE, "linkname": "sound"},
    "pipe": {"type": tarfile.FIFOTYPE},
    "character device": {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3},
    "block device": {"type": tarfile.BLKTYPE},
    "twice": {"name": "sound"},
    "twice, spelled otherwise": {"name": "./sound"},
    "no name": {"name": "."},
    "a line break": {"name": "../a\nb"},
    "a file as folder": {"name": "sound/x"},
}


@pytest.mark.parametrize("fields", ESCAPES.values(), ids=ESCAPES)
def test_nothing_leaves_the_folder(tmp_path, fields):
    fields = {k: v.format(tmp_path) if k == "name" else v for k, v in fields.items()}
    archive = archive_of(tmp_path / "x.tar", **fields)
    with pytest.raises(CheckpointError) as error:
        convert(archive, tmp_path / "deep" / "out")
    assert str(error.value).isprintable()
    if "sound/x" not in fields.values():
        assert str(error.value).endswith("this is refused.")
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]


def test_sparse_members_are_refused(tmp_path):
    """A few bytes that claim to be a large file."""
    member = {"pax_headers": {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}}
    member["pax_headers"] |= {"GNU.sparse.realsize": str(1 << 50), "GNU.sparse.name": "x"}
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("x")
        info.pax_headers = member["pax_headers"]
        data = b"1\n0\n1\n".ljust(512, b"\0") + b"x"
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    with pytest.raises(CheckpointError, match="not a regular file or folder; this is refused"):
        convert(tmp_path / "x.tar", tmp_path / "out")


def test_room_is_looked_at_first(tmp_path, monkeypatch):
    archive = tar_of(tmp_path / "x.tar.gz", TORCH)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 10**5, 10**5))
    with pytest.raises(CheckpointError, match=r"needs 0\.4 MB, but its disk has 0\.1 MB free"):
        convert(archive, tmp_path / "out", **SAID)
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar.gz"]


def test_room_for_what_grows(tmp_path):
    """A small file that unpacks to more than there is room for stops before it is written."""
    with gzip.open(tmp_path / "x.tar.gz", "wb") as file:
        member = tarfile.TarInfo("x.pt")
        member.size = 1 << 60
        file.write(member.tobuf(tarfile.GNU_FORMAT))
        file.write(bytes(1 << 20))
    with pytest.raises(CheckpointError, match=r"unpacks to 1152921504\.61 GB, but has only"):
        convert(tmp_path / "x.tar.gz", tmp_path / "out", **SAID)


def test_room_is_looked_at_for_each_member(tmp_path, monkeypatch):
    archive, folder = zeros_of(tmp_path / "x.tar.gz", 50_000_000), tmp_path / "folder"
    folder.mkdir()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 10**7))
    with pytest.raises(CheckpointError, match=r"needs 50\.0 MB, but its disk has 10\.0 MB free"):
        unpack(archive, folder)
    assert list(folder.iterdir()) == []


def zeros_of(path: Path, size: int, after: int = 0) -> Path:
    """A compressed archive of zeros, with more of them behind its end."""
    with gzip.open(path, "wb", compresslevel=1) as file:
        member = tarfile.TarInfo("zeros.bin")
        member.size = size
        file.write(member.tobuf())
        for rest in range(size + after + 1024, 0, -(1 << 20)):
            file.write(bytes(min(rest, 1 << 20)))
    return path


@pytest.mark.parametrize(("size", "after"), [(300_000_000, 0), (512, 300_000_000)])
def test_bombs(tmp_path, size, after):
    """A small archive of much is refused before it fills the disk, also if much is no member."""
    archive, folder = zeros_of(tmp_path / "x.tar.gz", size, after), tmp_path / "folder"
    folder.mkdir()
    read: list[int] = []
    with pytest.raises(CheckpointError, match=r"unpacks to 0\.30 GB|more than 0\.10 GB when unp"):
        unpack(archive, folder, read.append)
    assert [path.name for path in folder.iterdir()] == (["zeros.bin"] if after else [])
    assert sum(read) < archive.stat().st_size / 2


def test_many_members(tmp_path, monkeypatch):
    monkeypatch.setattr(archive_module, "MAX_MEMBERS", 100)
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for number in range(101):
            archive.addfile(tarfile.TarInfo(str(number)))
    with pytest.raises(CheckpointError, match="more than 100 members"):
        convert(tmp_path / "x.tar", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]


LARGE_HEADERS = {
    "long name": tarfile.GNUTYPE_LONGNAME,
    "long link": tarfile.GNUTYPE_LONGLINK,
    "pax header": tarfile.XHDTYPE,
    "global pax header": tarfile.XGLTYPE,
}


@pytest.mark.parametrize("kind", LARGE_HEADERS.values(), ids=LARGE_HEADERS)
def test_large_headers_are_not_read(tmp_path, kind):
    member = tarfile.TarInfo("x")
    member.type, member.size = kind, 200_000_000
    with (tmp_path / "x.tar").open("wb") as file:
        file.write(member.tobuf())
        file.truncate(300_000_000)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="a header of more than 100,000 bytes"):
            convert(tmp_path / "x.tar", tmp_path / "out")
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()


def test_list_of_holes_without_an_end_is_not_read(tmp_path):
    info = tarfile.TarInfo("x")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    info.size = 200_000_000
    with (tmp_path / "x.tar").open("wb") as file:
        file.write(info.tobuf(tarfile.PAX_FORMAT))
        file.write(b"9" * 9 + b"\n" + b"1\n" * 20_000_000)
        file.truncate(300_000_000)
    with pytest.raises(CheckpointError, match="a header of more than"):
        convert(tmp_path / "x.tar", tmp_path / "out")


def test_chain_of_headers(tmp_path):
    """tarfile calls itself for each."""
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XGLTYPE, 512
    record = header.tobuf() + b"8 a=bc\n".ljust(512, b"\0")
    (tmp_path / "x.tar").write_bytes(record * 5000 + bytes(1024))
    with pytest.raises(CheckpointError, match=r"x\.tar: not a valid archive"):
        convert(tmp_path / "x.tar", tmp_path / "out")


@pytest.mark.parametrize("name", ["a/" * 40 + "x", "a" * 1001], ids=["deep", "long"])
def test_long_names(tmp_path, name):
    archive = archive_of(tmp_path / "x.tar", name=name)
    with pytest.raises(CheckpointError, match="has a name that is too long; this is refused"):
        convert(archive, tmp_path / "out")


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_cut_at_every_block(tmp_path, mode):
    """Wherever an archive breaks off, also between two members, it is refused."""
    members = [EMBEDDED / "config.json", GOLDEN / "tiny-2b" / "config.json", EMBEDDED / "README.md"]
    members = [path for path in members if path.is_file()]
    archive = tar_of(tmp_path / "x.tar", *members[:1], name="a", mode=mode)
    content = archive.read_bytes()
    folder = tmp_path / "folder"
    folder.mkdir()
    unpack(archive, folder)
    size = (folder / "a" / "config.json").stat().st_size
    needed = 512 + -(-size // 512) * 512 + 512  # header, content, one block of zeros
    for length in range(0, len(content) if mode == "w:gz" else needed, 64):
        shutil.rmtree(folder)
        folder.mkdir()
        archive.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"x\.tar: not a valid archive"):
            unpack(archive, folder)


def test_a_broken_header_is_not_the_end(tmp_path):
    archive = tar_of(tmp_path / "x.tar", TORCH, GOLDEN / "tiny-2b" / "config.json", mode="w")
    content = bytearray(archive.read_bytes())
    with tarfile.open(archive) as file:
        second = file.getmembers()[1].offset
    content[second] ^= 1
    archive.write_bytes(content)
    with pytest.raises(CheckpointError, match="is truncated after"):
        unpack(archive, tmp_path)


def test_archives_in_archives_and_of_nothing(tmp_path):
    inner = tar_of(tmp_path / "inner.tar.gz", TORCH)
    tar_of(tmp_path / "outer.tar", inner, mode="w")
    with pytest.raises(CheckpointError, match="an archive in an archive"):
        convert(tmp_path / "outer.tar", tmp_path / "out", **SAID)
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(CheckpointError, match="no such file; is this the folder of a model"):
        convert(tmp_path / "empty.tar", tmp_path / "out", **SAID)


def test_messages_name_the_archive(tmp_path):
    """Not the temporary folder, which is gone when the message is read."""
    broken = tmp_path / "x.pt"
    broken.write_bytes(TORCH.read_bytes()[:-100])
    archive = tar_of(tmp_path / "x.tar", broken, mode="w")
    with pytest.raises(CheckpointError) as error:
        convert(archive, tmp_path / "out", **SAID)
    assert str(error.value).startswith(f"{archive}/x.pt: not a valid PyTorch file")
    assert "partial" not in str(error.value)
