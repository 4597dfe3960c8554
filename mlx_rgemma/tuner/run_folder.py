"""Folder of a training run: one run at a time, and no empty folder after a failed run."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mlx_rgemma.errors import UserError
from mlx_rgemma.io.atomic import NO_LOCKS

LOCK_FILE = ".lock"
"""Locked by the run that writes into the folder. After a kill the file remains, unlocked."""


@contextmanager
def run_folder(
    folder: Path, *, lock: bool = True, show: Callable[[str], None] = print
) -> Iterator[None]:
    """Create a run's folder and lock it; created folders that are empty at the end are removed.

    On a file system without locks, one line warns that two runs are not kept apart.

    Args:
        folder: The folder; it may exist.
        lock: Whether to lock it. Of several ranks, rank 0 does.
        show: Prints a line.

    Raises:
        UserError: If another run has locked it.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not lock:
            yield
            return
        file = folder / LOCK_FILE
        handle = _locked(file, show)
        try:
            yield
        finally:
            with suppress(OSError):
                file.unlink()
            if handle is not None:
                os.close(handle)
    finally:
        for path in created:
            with suppress(OSError):
                path.rmdir()


def _locked(file: Path, show: Callable[[str], None]) -> int | None:
    """Return a handle that holds the lock until it is closed; None where there are no locks."""
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(
                    f"{file.parent}: another run is training in this folder; wait until it ends, or"
                    " name another folder."
                ) from error
            if error.errno not in NO_LOCKS:
                raise
            show(
                f"Warning: {file.parent} is on a disk without file locks; make sure that no other"
                " run writes into it."
            )
            return None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(file)):
                return handle
        os.close(handle)  # another run removed the file between opening and locking
