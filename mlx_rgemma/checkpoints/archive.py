"""Tar archives as they are downloaded, unpacked so that nothing leaves its folder."""

from __future__ import annotations

import gzip
import shutil
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from mlx_rgemma.checkpoints.folder import shortened
from mlx_rgemma.checkpoints.safetensors import MEND
from mlx_rgemma.errors import CheckpointError
from mlx_rgemma.io.atomic import check_room

BLOCK = 512
COPIED_TOGETHER = 1 << 22
GZIP = b"\x1f\x8b"


def unpack(
    archive: Path, folder: Path, advance: Callable[[int], None] = lambda nbytes: None
) -> None:
    """Unpack a tar or tar.gz archive.

    Only files and folders are unpacked, and only below `folder`; the archive is read once, to its
    end, and all that it has of checksums is looked at.

    Args:
        archive: The archive.
        folder: An empty folder.
        advance: Told how many bytes of the archive were read.

    Raises:
        CheckpointError: If the archive is damaged, holds what would leave the folder, links or
            devices, or the disk has not enough room.
    """
    size = archive.stat().st_size
    check_room(folder, size)  # weights hardly shrink; each member is checked again
    try:
        with archive.open("rb") as raw:
            zipped = raw.read(2) == GZIP
            raw.seek(0)
            source: Any = gzip.GzipFile(fileobj=raw) if zipped else raw
            stream: Any = _Stream(source, raw.tell, advance)
            end = 0
            with tarfile.open(fileobj=stream, mode="r|", bufsize=COPIED_TOGETHER) as members:
                for member in members:
                    end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                    _unpack_member(archive, members, member, folder)
            stream.drain()
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise _damaged(archive, " ".join(str(error).split())) from error
    if stream.content_end > end or stream.position < end + BLOCK:
        # tarfile takes a broken header for the end.
        raise _damaged(archive, f"it breaks off after {end} bytes")


def _unpack_member(
    archive: Path, members: tarfile.TarFile, member: tarfile.TarInfo, folder: Path
) -> None:
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts or "\0" in member.name:
        raise _refused(archive, member, "leads out of the archive's folder")
    if not (member.isreg() or member.isdir()) or member.issparse():
        raise _refused(archive, member, "is no plain file or folder")
    target = folder.joinpath(*name.parts)
    if member.isdir():
        target.mkdir(parents=True, exist_ok=True)
        return
    if target == folder:
        raise _refused(archive, member, "has no name")
    check_room(folder, member.size)
    target.parent.mkdir(parents=True, exist_ok=True)
    content = members.extractfile(member)
    assert content is not None
    try:
        with target.open("xb") as file:
            shutil.copyfileobj(content, file, COPIED_TOGETHER)
    except FileExistsError:
        raise _refused(archive, member, "is in the archive twice") from None
    if target.stat().st_size != member.size:
        raise _damaged(archive, f"{shortened([member.name])} is cut short")


def _refused(archive: Path, member: tarfile.TarInfo, why: str) -> CheckpointError:
    return CheckpointError(f"{archive}: {shortened([member.name])} {why}; this is refused.")


def _damaged(archive: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{archive}: not a sound archive: {what}; {MEND}.")


class _Stream:
    """A stream that knows how far it was read, and where the last byte was that is not zero."""

    def __init__(
        self, source: Any, told: Callable[[], int], advance: Callable[[int], None]
    ) -> None:
        self.source, self.told, self.advance = source, told, advance
        self.position = self.content_end = self._told = 0

    def read(self, size: int) -> Any:
        data = self.source.read(size)
        content = data.rstrip(b"\0")
        if content:
            self.content_end = self.position + len(content)
        self.position += len(data)
        told = self.told()
        self.advance(told - self._told)
        self._told = told
        return data

    def drain(self) -> None:
        while self.read(COPIED_TOGETHER):
            pass
