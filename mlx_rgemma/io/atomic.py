"""Files and directories that appear whole or not at all.

Data is written under a temporary name beside the target, flushed to the disk and renamed. A
temporary file is locked as long as its writer lives: the next writer of the same target removes the
files of writers that were killed, and no others.

with atomic_file(path) as partial:
    mx.save_safetensors(str(partial), arrays)
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from mlx_rgemma.errors import CheckpointError

SPARE_BYTES = 4_000_000
"""Room for the small files beside the weights."""

MAX_NAME_BYTES, MAX_SUFFIX_BYTES = 200, 32
"""Parts of the target's name in a temporary name: file systems take 255 bytes in all."""

TEMPORARY = re.compile(r"\.partial-[0-9a-f]{8}")

NO_LOCKS = frozenset(
    (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF)
)
"""Errors of file systems without locks. NFS has none for directories (EBADF)."""

MLX_WRITE_ERRORS = ("[write]", "[save]", "[save_safetensors] Failed to open")
"""Beginnings of the messages of MLX's writers; they come as RuntimeError."""


@contextmanager
def atomic_file(path: str | os.PathLike[str], suffix: str | None = None) -> Iterator[Path]:
    """Write a file under a temporary name, and replace the target at the end.

    After any exception the target is as it was, and the temporary file is gone. The umask
    applies; a file that is replaced passes on its permissions. A symlink is followed.

    Args:
        path: The file; one that exists is replaced.
        suffix: End of the temporary name, for writers that look at it; default: that of `path`.

    Yields:
        The temporary file, which exists and is empty.

    Raises:
        CheckpointError: If the target is no regular file or its directory does not exist, the
            disk is full, or writing fails.
    """
    path = Path(path)
    with _errors_in_one_line(path):
        target = check_target(path)
        _remove_abandoned(target)
        mode = stat.S_IMODE(target.stat().st_mode) if os.path.exists(target) else None

        def create(partial: Path) -> int:
            bits = 0o666 if mode is None else mode | 0o600
            return os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, bits)

        with _terminable():
            partial, lock = _locked(target, target.suffix if suffix is None else suffix, create)
            try:
                yield partial
                if mode is not None:
                    os.chmod(partial, mode)
                sync_file(partial)
                os.replace(partial, target)
                _sync_directory(target.parent)
            finally:
                with suppress(OSError):
                    partial.unlink()
                os.close(lock)


@contextmanager
def atomic_directory(target: Path, nbytes: int) -> Iterator[Path]:
    """Write a new directory under a temporary name, and rename it at the end.

    Exceptions, Ctrl-C, SIGTERM and SIGHUP leave nothing behind, not even new parents.

    Args:
        target: The directory; nothing of that name may exist.
        nbytes: Bytes that are about to be written, to check that there is room.

    Yields:
        The temporary directory.

    Raises:
        CheckpointError: If the target exists, the disk has not enough room, or writing fails.
    """
    refuse_existing(target)
    with _partial_directory(target, nbytes) as partial:
        yield partial
        _sync_tree(partial)
        refuse_existing(target)
        partial.rename(target)
        _sync_directory(target.parent)


@contextmanager
def scratch_directory(target: Path) -> Iterator[Path]:
    """Make a temporary directory beside a directory to be; remove it at the end.

    Args:
        target: The directory to be.

    Yields:
        The temporary directory.

    Raises:
        CheckpointError: If it cannot be made or written.
    """
    with _partial_directory(target, 0) as partial:
        yield partial


def check_target(path: str | os.PathLike[str]) -> Path:
    """Refuse a file that `atomic_file` could not write, before anything slow is done.

    Returns:
        The file that is to be written, at the end of all symlinks.

    Raises:
        CheckpointError: If it is a directory, a device or a pipe, or its directory does not exist.
    """
    target = Path(os.path.realpath(path))
    if os.path.islink(target):
        raise CheckpointError(f"{path}: symbolic links in a circle, expected the name of a file.")
    if os.path.isdir(target):
        raise CheckpointError(f"{path}: a folder, expected the name of a file.")
    if os.path.exists(target) and not os.path.isfile(target):
        raise CheckpointError(f"{path}: a device or pipe, expected the name of a file.")
    if not os.path.isdir(target.parent):
        raise CheckpointError(f"{path}: there is no folder {target.parent}.")
    return target


def refuse_existing(target: Path) -> None:
    """Refuse to write over anything.

    Raises:
        CheckpointError: If the target exists. Abandoned temporary files in its
            folder are removed even then.
    """
    if os.path.lexists(target):
        _remove_abandoned(target)
        raise CheckpointError(f"{target}: exists already; delete it, or name another folder.")


def check_room(path: Path, nbytes: int) -> None:
    """Check that the disk of a directory (or of its parent) has room.

    Raises:
        CheckpointError: If it has not.
    """
    free = shutil.disk_usage(path if path.is_dir() else path.parent).free
    if free < nbytes:
        raise CheckpointError(
            f"{path}: needs {gigabytes(nbytes)}, but its disk has {gigabytes(free)} free; make"
            " room, or name a folder on another disk."
        )


def gigabytes(nbytes: int) -> str:
    """Format a size in GB or MB."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"


def sync_file(path: Path) -> None:
    """Flush a file to the disk: on macOS out of the drive's own cache, too."""
    with path.open("rb") as file:
        full_sync = getattr(fcntl, "F_FULLFSYNC", None)
        if full_sync is not None:
            try:
                fcntl.fcntl(file, full_sync)
                return
            except OSError:  # a network volume
                pass
        os.fsync(file.fileno())


@contextmanager
def _partial_directory(target: Path, nbytes: int) -> Iterator[Path]:
    """Make a temporary directory, and its parents; remove what is left of them at the end."""
    made = [path for path in (target.parent, *target.parent.parents) if not path.exists()]

    def create(partial: Path) -> int:
        partial.mkdir()
        return os.open(partial, os.O_RDONLY)

    try:
        with _errors_in_one_line(target), _terminable():
            target.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(target)
            if nbytes:
                check_room(target, nbytes + SPARE_BYTES)
            partial, lock = _locked(target, "", create)
            try:
                yield partial
            finally:
                shutil.rmtree(partial, ignore_errors=True)
                os.close(lock)
    except BaseException:
        for directory in made:
            with suppress(OSError):
                directory.rmdir()
        raise


def _prefix(target: Path) -> str:
    """Return the beginning of all temporary names of a target, cut for names of 255 bytes."""
    name = os.fsencode(target.name)[:MAX_NAME_BYTES].decode(errors="ignore")
    return f".{name}.partial-"


def _locked(target: Path, suffix: str, create: Callable[[Path], int]) -> tuple[Path, int]:
    """Create something under a temporary name and lock it until its handle is closed."""
    suffix = suffix if len(os.fsencode(suffix)) <= MAX_SUFFIX_BYTES else ""
    while True:
        partial = target.with_name(_prefix(target) + secrets.token_hex(4) + suffix)
        handle = create(partial)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(handle)
                raise
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(partial)):
                return partial, handle
        os.close(handle)  # another writer took it for abandoned before it was locked


def _remove_abandoned(target: Path) -> None:
    """Remove temporary files of a target that no living process has locked."""
    pattern = re.compile(re.escape(_prefix(target)) + r"[0-9a-f]{8}(\..*)?", re.DOTALL)
    with suppress(OSError), os.scandir(target.parent) as entries:
        for name in [entry.name for entry in entries if pattern.fullmatch(entry.name)]:
            with suppress(OSError):
                _remove_unlocked(target.with_name(name))


def _remove_unlocked(path: Path) -> None:
    directory = stat.S_ISDIR(path.lstat().st_mode)
    flags = os.O_RDONLY | os.O_DIRECTORY if directory else os.O_RDWR
    handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if directory:
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
    finally:
        os.close(handle)


def _sync_tree(directory: Path) -> None:
    for folder, _, names in os.walk(directory, topdown=False):
        for name in names:
            path = Path(folder, name)
            if path.is_file():
                sync_file(path)
        _sync_directory(Path(folder))


def _sync_directory(path: Path) -> None:
    """Flush the names in a directory, where its file system can."""
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def _errors_in_one_line(path: Path) -> Iterator[None]:
    """Turn the errors of writing into one line that names the file."""
    try:
        yield
    except OSError as error:
        where = error.filename if isinstance(error.filename, str | os.PathLike) else path
        reason = error.strerror or str(error)
        raise _failed(path, where, reason, error.errno) from error
    except RuntimeError as error:
        if not str(error).startswith(MLX_WRITE_ERRORS):
            raise
        reason = " ".join(str(error).split()).rstrip(".")
        raise _failed(path, path, f"{reason}; is the disk full?", None) from error


def _failed(
    path: Path, where: str | os.PathLike[str], reason: str, number: int | None
) -> CheckpointError:
    if TEMPORARY.search(os.fspath(where)):
        where = path
    if number in (errno.ENOSPC, errno.EDQUOT):
        reason += "; make room, or name another disk"
    return CheckpointError(f"{where}: {reason}; {path.name} was not written.")


@contextmanager
def _terminable() -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise an exception, as Ctrl-C does."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
