"""A folder that appears whole or not at all."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from mlx_rgemma.errors import CheckpointError

SPARE_BYTES = 4_000_000
"""Room for the small files beside the weights."""

PARTIAL = "partial"


@contextmanager
def new_folder(target: Path, nbytes: int) -> Iterator[Path]:
    """Write a folder in a temporary place beside it; at the end it is moved there in one step.

    Whatever goes wrong on the way, an exception, Ctrl-C or SIGTERM, leaves nothing behind. What a
    run that was killed outright (or lost its machine's power) has left is removed by the next one
    to the same target, also if that is refused because the target is whole.

    Args:
        target: The folder to be; nothing of that name may exist.
        nbytes: How much is about to be written.

    Yields:
        The temporary folder.

    Raises:
        CheckpointError: If the target exists, the disk has not enough room, or writing fails.
    """
    refuse_existing(target)
    with _partial_folder(target, nbytes) as partial:
        yield partial
        _sync(partial)
        refuse_existing(target)
        partial.rename(target)
        _sync_folder(target.parent)


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """A folder beside a folder to be, for what is needed on the way; it is removed at the end.

    Args:
        target: The folder to be.

    Yields:
        The temporary folder.

    Raises:
        CheckpointError: If it cannot be made or written.
    """
    with _partial_folder(target, 0) as partial:
        yield partial


@contextmanager
def _partial_folder(target: Path, nbytes: int) -> Iterator[Path]:
    """A temporary folder beside another; what is left of it and its parents is cleared away."""
    made = [path for path in (target.parent, *target.parent.parents) if not path.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        if nbytes:
            check_room(target, nbytes + SPARE_BYTES)
        partial = target.parent / f".{target.name}.{PARTIAL}-{secrets.token_hex(4)}"
        with _until_terminated():
            partial.mkdir()
            lock = os.open(partial, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)  # held until this process ends, however it does
                yield partial
            finally:
                shutil.rmtree(partial, ignore_errors=True)
                os.close(lock)
    except BaseException as error:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            where = error.filename or target
            raise CheckpointError(
                f"{where}: {error.strerror or error}; {target.name} was not written."
            ) from error
        raise


def refuse_existing(target: Path) -> None:
    """Never write over anything.

    Raises:
        CheckpointError: If there is something of that name. What a killed run left beside it is
            removed all the same.
    """
    if os.path.lexists(target):
        _remove_abandoned(target)
        raise CheckpointError(f"{target}: exists already; delete it, or name another folder.")


def _remove_abandoned(target: Path) -> None:
    """Remove what runs that nobody could clean up after have left."""
    for partial in target.parent.glob(f".{_literal(target.name)}.{PARTIAL}-*"):
        with suppress(OSError):
            lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(partial, ignore_errors=True)
            finally:
                os.close(lock)


def _literal(name: str) -> str:
    """A name as a pattern that matches nothing but itself."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def check_room(path: Path, nbytes: int) -> None:
    """See that there is room for a folder, or in it.

    Raises:
        CheckpointError: If there is not.
    """
    free = shutil.disk_usage(path if path.is_dir() else path.parent).free
    if free < nbytes:
        raise CheckpointError(
            f"{path}: needs {gigabytes(nbytes)}, but its disk has {gigabytes(free)} free; make"
            " room, or name a folder on another disk."
        )


def gigabytes(nbytes: int) -> str:
    """A size as people read it."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"


def _sync(folder: Path) -> None:
    """See that files and folder are on the disk before they are called by their name."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _until_terminated() -> Iterator[None]:
    """Have SIGTERM and SIGHUP end the program in good order, as Ctrl-C does."""

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
