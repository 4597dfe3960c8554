"""Safe unpacking of downloaded tar archives."""

from __future__ import annotations

import gzip
import shutil
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from mlx_rgemma.errors import CheckpointError, shortened
from mlx_rgemma.io.atomic import check_room, gigabytes
from mlx_rgemma.io.reading import open_regular, reason
from mlx_rgemma.io.safetensors import RECOVERY_HINT

MAX_MEMBERS = 20_000
MAX_HEADER_BYTES = 100_000
"""Bytes of the headers before a member; a Unicode name needs 1.5 kB."""

MAX_HEADERS_BYTES = 64_000_000
MAX_NAME, MAX_LEVELS = 1000, 30

MAX_RATIO = 10
"""Ratio of unpacked to packed size: weights hardly compress."""

MIN_LIMIT = 100_000_000
"""Unpacked size that is allowed in any case."""

BLOCK = 512
COPIED_TOGETHER = 1 << 22
DAMAGE = (
    *(tarfile.TarError, zlib.error, gzip.BadGzipFile, EOFError),
    *(ValueError, RecursionError),  # of tarfile
)
GZIP = b"\x1f\x8b"


def unpack(
    archive: Path, folder: Path, advance: Callable[[int], None] = lambda nbytes: None
) -> None:
    """Unpack a tar or tar.gz archive.

    Only regular files and folders below `folder` are unpacked; the archive is read once, to its
    end, and its checksums are verified. A member is checked before it is written.

    Args:
        archive: The archive.
        folder: An empty folder.
        advance: Receives the bytes read of the archive, for a progress bar.

    Raises:
        CheckpointError: If the archive is damaged or too large, has a path out of the folder, a
            link or a device, or the disk has not enough room.
    """
    size = archive.stat().st_size
    limit = max(MAX_RATIO * size, MIN_LIMIT)
    check_room(folder, size)  # each member is checked again
    try:
        with open_regular(archive) as raw:
            zipped = raw.read(2) == GZIP
            raw.seek(0)
            source: Any = gzip.GzipFile(fileobj=raw) if zipped else raw
            stream: Any = _Stream(source, raw.tell, advance, limit)
            end = headers = count = 0
            stream.expect_header()  # opening reads the first
            with tarfile.open(fileobj=stream, mode="r|", bufsize=COPIED_TOGETHER) as members:
                # tarfile reads headers of any size into memory: bound them.
                while True:
                    stream.expect_header()
                    member = members.next()
                    stream.end = None
                    if member is None:
                        break
                    headers += member.offset_data - end
                    count += 1
                    if count > MAX_MEMBERS or headers > MAX_HEADERS_BYTES:
                        raise _too_large(archive, f"more than {MAX_MEMBERS:,} members")
                    end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                    _unpack_member(archive, members, member, folder, limit - member.offset_data)
            stream.drain()
    except CheckpointError:
        raise
    except DAMAGE as error:
        raise _damaged(archive, reason(error)) from error
    if stream.content_end > end or stream.position < end + BLOCK:
        # tarfile stops at a broken header as at the end.
        raise _damaged(archive, f"it is truncated after {end} bytes")


def _unpack_member(
    archive: Path, members: tarfile.TarFile, member: tarfile.TarInfo, folder: Path, limit: int
) -> None:
    name = PurePosixPath(member.name)
    if len(member.name) > MAX_NAME or len(name.parts) > MAX_LEVELS:
        raise _refused(archive, member, "has a name that is too long")
    if name.is_absolute() or ".." in name.parts or "\0" in member.name:
        raise _refused(archive, member, "leads out of the archive's folder")
    if not (member.isreg() or member.isdir()) or member.issparse():
        raise _refused(archive, member, "is not a regular file or folder")
    target = folder.joinpath(*name.parts)
    if member.isdir():
        target.mkdir(parents=True, exist_ok=True)
        return
    if target == folder:
        raise _refused(archive, member, "has no name")
    if member.size < 0:
        raise _damaged(archive, f"{shortened([member.name])} has a negative size")
    if member.size > limit:
        raise _too_large(archive, gigabytes(member.offset_data + member.size))
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
    return CheckpointError(f"{archive}: not a valid archive: {what}; {RECOVERY_HINT}.")


def _too_large(archive: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{archive}: unpacks to {what}, but has only {gigabytes(archive.stat().st_size)}; this is"
        " refused."
    )


class _Stream:
    """Stream with limits, which records its position and that of the last nonzero byte.

    Attributes:
        limit: Maximum of bytes in all.
        end: Current maximum of the position, or None.
    """

    def __init__(
        self,
        source: Any,
        raw_position: Callable[[], int],
        advance: Callable[[int], None],
        limit: int,
    ) -> None:
        self.source, self.raw_position = source, raw_position
        self.advance, self.limit = advance, limit
        self.position = self.content_end = self._advanced = 0
        self.end: int | None = None

    def expect_header(self) -> None:
        """Limit the next reads to a header."""
        self.end = self.position + MAX_HEADER_BYTES + COPIED_TOGETHER

    def read(self, size: int) -> Any:
        if self.end is not None and self.position + size > self.end:
            raise ValueError(f"a header of more than {MAX_HEADER_BYTES:,} bytes")
        if self.position > self.limit:
            raise ValueError(f"more than {gigabytes(self.limit)} when unpacked")
        data = self.source.read(size)
        content = data.rstrip(b"\0")
        if content:
            self.content_end = self.position + len(content)
        self.position += len(data)
        raw = self.raw_position()
        self.advance(raw - self._advanced)
        self._advanced = raw
        return data

    def drain(self) -> None:
        while self.read(COPIED_TOGETHER):
            pass
