"""Files are replaced whole or not at all, whatever happens meanwhile."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_rgemma.errors import CheckpointError, UserError
from mlx_rgemma.io import atomic
from mlx_rgemma.io.atomic import atomic_file

WRITE = """
import sys, time
from mlx_rgemma.io.atomic import atomic_file

with atomic_file(sys.argv[1], ".safetensors") as partial:
    partial.write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""

LIMITED = """
import resource, sys
import mlx.core as mx
from mlx_rgemma import cli
from mlx_rgemma.io.atomic import atomic_file

def write():
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
    with atomic_file(sys.argv[1], ".safetensors") as partial:
        if sys.argv[2] == "mlx":
            mx.save_safetensors(str(partial), {"a": mx.zeros(10_000)})
        else:
            partial.write_bytes(bytes(10_000))

sys.exit(cli.run(write))
"""


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    "name", ["book", "a.b", "x.npz", "ü", "n" * 255, "ü" * 127, "[x]*", "a\nb"]
)
def test_whole(tmp_path, name):
    path = tmp_path / name
    for text in ("old", "new"):
        with atomic_file(path) as partial:
            assert partial.parent == tmp_path and partial.name.startswith(".")
            assert not path.exists() or path.read_text() == "old"
            partial.write_text(text)
        assert path.read_text() == text
        assert names(tmp_path) == {name}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("before", [None, "old"])
def test_not_at_all(tmp_path, error, before):
    path = tmp_path / "x"
    if before is not None:
        path.write_text(before)
    with pytest.raises(error), atomic_file(path) as partial:
        partial.write_text("half")
        raise error
    assert names(tmp_path) == (set() if before is None else {"x"})
    assert before is None or path.read_text() == before


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077], ids=oct)
def test_umask_and_permissions(tmp_path, mask):
    path = tmp_path / "x"
    before = os.umask(mask)
    try:
        with atomic_file(path, ".safetensors") as partial:
            mx.save_safetensors(str(partial), {"a": mx.zeros(3)})
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask
        for mode in (0o600, 0o640, 0o444):
            path.chmod(mode)
            with atomic_file(path) as partial:
                assert partial.stat().st_mode & 0o777 & ~mode & ~0o200 == 0
                partial.write_text("new")
            assert path.stat().st_mode & 0o777 == mode
    finally:
        os.umask(before)


def test_symlinks_are_followed(tmp_path):
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "link").symlink_to("real/x")  # to nothing, at first
    (tmp_path / "second").symlink_to(tmp_path / "link")
    for name in ("link", "second", "link"):
        with atomic_file(tmp_path / name) as partial:
            assert partial.parent == real
            partial.write_text(name)
        assert (real / "x").read_text() == name
    assert names(tmp_path) == {"real", "link", "second"} and names(real) == {"x"}
    assert (tmp_path / "link").is_symlink() and (tmp_path / "second").is_symlink()


def test_targets_that_are_no_files(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "circle").symlink_to("circle")
    os.mkfifo(tmp_path / "pipe")
    before = names(tmp_path)
    for target, message in (
        (tmp_path / "folder", "a folder"),
        (tmp_path / "pipe", "a device or pipe"),
        ("/dev/null", "a device or pipe"),
        (tmp_path / "circle", "in a circle"),
        (tmp_path / "no" / "x", "there is no folder"),
        (tmp_path / ("n" * 256), "File name too long"),
    ):
        with pytest.raises(UserError, match=message) as error, atomic_file(target):
            pass
        assert str(error.value).startswith(f"{target}: ")
        assert names(tmp_path) == before


@pytest.mark.parametrize("writer", ["python", "mlx"])
@pytest.mark.parametrize("before", [None, "old"])
def test_no_room(tmp_path, writer, before):
    """A limit on the size of files stands in for a full disk."""
    path = tmp_path / "x"
    if before is not None:
        path.write_text(before)
    command = [sys.executable, "-c", LIMITED, str(path), writer]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert f"{path}: " in line and line.endswith("; x was not written.")
    assert ("Unable to write" if writer == "mlx" else "File too large") in line
    assert names(tmp_path) == (set() if before is None else {"x"})
    assert before is None or path.read_text() == before


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_has_a_remedy(tmp_path, number):
    for where in (None, tmp_path / "other"):
        message = f"{where or tmp_path / 'x'}: {os.strerror(number)}; make room, or name another"
        with pytest.raises(CheckpointError) as error, atomic_file(tmp_path / "x"):
            raise OSError(number, os.strerror(number), where and str(where))
        assert str(error.value).startswith(message)


def test_errors_that_are_not_of_writing_pass(tmp_path):
    for message in ("[matmul] Shapes do not fit", "[metal] out of memory"):
        with pytest.raises(RuntimeError, match=r"^.(matmul|metal)"), atomic_file(tmp_path / "x"):
            raise RuntimeError(message)
    assert names(tmp_path) == set()


def killed(path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    process.kill()
    process.wait(timeout=30)


def test_the_next_writer_removes_what_a_killed_one_left(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    killed(path)
    (left,) = names(tmp_path) - {"x"}
    assert left.startswith(".x.partial-") and left.endswith(".safetensors")
    assert path.read_text() == "old"
    others = {".y.partial-01234567", ".x.partial-notes", ".x.partial-0123456", "x.partial-01234567"}
    for name in others:
        (tmp_path / name).write_text("mine")
    (tmp_path / ".x.partial-76543210").symlink_to("x")
    with atomic_file(path) as first:
        assert left not in names(tmp_path)
        with pytest.raises(RuntimeError), atomic_file(path) as second:
            assert first.exists() and second.exists()
            raise RuntimeError
        first.write_text("new")
    assert names(tmp_path) == {"x", ".x.partial-76543210", *others}
    assert path.read_text() == "new"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=["SIGTERM", "SIGHUP"])
def test_terminated(tmp_path, number):
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE, str(tmp_path / "x")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    process.send_signal(number)
    assert process.wait(timeout=30) == 128 + number
    assert names(tmp_path) == set()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF])
def test_a_file_system_without_locks(tmp_path, monkeypatch, number):
    """Nobody can tell whether another writer lives there: its file is left alone."""

    def refuse(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / ".x.partial-01234567").write_text("of a living writer?")
    with atomic_file(tmp_path / "x") as partial:
        partial.write_text("new")
    assert names(tmp_path) == {"x", ".x.partial-01234567"}


def test_other_errors_of_locks_are_one_line(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(CheckpointError, match="Input/output error"), atomic_file(tmp_path / "x"):
        pytest.fail("entered")


def test_data_reaches_the_disk_before_the_name(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace

    def synced(handle):
        calls.append("directory" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    def replaced(source, target):
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    with atomic_file(tmp_path / "x") as partial:
        partial.write_text("new")
    assert calls == ["file", "rename", "directory"]


@pytest.mark.parametrize("refused", [False, True])
def test_macos_flushes_the_drive_too(tmp_path, monkeypatch, refused):
    """A stand-in for macOS; network volumes refuse the call there."""
    calls = []

    def control(file, command):
        calls.append(command)
        if refused:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", control)
    monkeypatch.setattr(os, "fsync", lambda handle: calls.append("fsync"))
    (tmp_path / "x").write_text("new")
    atomic.sync_file(tmp_path / "x")
    assert calls == ([51, "fsync"] if refused else [51])


def test_many_writers_of_one_file(tmp_path):
    """Writers that clear up after each other never take a living one for dead."""
    path, failed = tmp_path / "x", []

    def write(number: int) -> None:
        try:
            for _ in range(100):
                with atomic_file(path) as partial:
                    partial.write_text(str(number) * 1000)
                assert len(set(path.read_text())) == 1
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert names(tmp_path) == {"x"} and path.stat().st_size == 1000


def test_a_writer_begins_again_when_it_was_taken_for_dead(tmp_path, monkeypatch):
    """Another writer locks a temporary file between its creation and its lock, and removes it."""
    flock, taken = fcntl.flock, []

    def late(handle, operation):
        if not taken and operation == fcntl.LOCK_EX:
            (partial,) = tmp_path.iterdir()
            partial.unlink()
            taken.append(partial)
        flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with atomic_file(tmp_path / "x") as partial:
        assert partial not in taken
        partial.write_text("new")
    assert taken and (tmp_path / "x").read_text() == "new"
