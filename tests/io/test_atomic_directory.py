"""Directories appear whole or not at all, whatever happens meanwhile."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest

from mlx_rgemma.errors import CheckpointError
from mlx_rgemma.io.atomic import atomic_directory

WRITE = """
import sys, time
from pathlib import Path
from mlx_rgemma import cli
from mlx_rgemma.io.atomic import atomic_directory

def write():
    with atomic_directory(Path(sys.argv[1]), 1000) as folder:
        (folder / "file").write_text("x")
        print("writing", flush=True)
        time.sleep(60)

sys.exit(cli.run(write))
"""


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_whole(tmp_path):
    target = tmp_path / "a" / "b" / "new"
    with atomic_directory(target, 10) as folder:
        assert folder.parent == target.parent and folder.name.startswith(".")
        (folder / "file").write_text("x")
        assert not target.exists()
    assert names(target) == {"file"}
    assert names(target.parent) == {"new"}
    plain = tmp_path / "plain"
    plain.mkdir()
    assert target.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_not_at_all(tmp_path, error):
    with pytest.raises(error), atomic_directory(tmp_path / "a" / "b" / "new", 10) as folder:
        (folder / "file").write_text("x")
        raise error
    assert names(tmp_path) == set()


@pytest.mark.parametrize("kind", ["folder", "file", "link to nothing"])
def test_existing_target_is_refused(tmp_path, kind):
    target = tmp_path / "new"
    if kind == "folder":
        target.mkdir()
    elif kind == "file":
        target.write_text("mine")
    else:
        target.symlink_to(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="exists already"), atomic_directory(target, 10):
        pytest.fail("entered")
    assert names(tmp_path) == {"new"}


def test_target_that_comes_up_meanwhile_is_kept(tmp_path):
    target = tmp_path / "new"
    with pytest.raises(CheckpointError, match="exists already"), atomic_directory(target, 10):
        target.mkdir()
    assert names(tmp_path) == {"new"} and names(target) == set()


def test_full_disk_is_seen_first(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**10, 9 * 10**9, 10**9))
    with (
        pytest.raises(CheckpointError, match=r"needs 2\.00 GB, but its disk has 1\.00 GB free"),
        atomic_directory(tmp_path / "a" / "new", 2 * 10**9),
    ):
        pytest.fail("entered")
    assert names(tmp_path) == set()


def test_failing_write(tmp_path):
    with (
        pytest.raises(CheckpointError, match=r"No such file or directory; new was not written"),
        atomic_directory(tmp_path / "new", 10) as folder,
    ):
        (folder / "no" / "file").write_text("x")
    assert names(tmp_path) == set()


def test_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(CheckpointError, match="was not written"),
        atomic_directory(tmp_path / "file" / "new", 10),
    ):
        pytest.fail("entered")
    assert names(tmp_path) == {"file"}


def interrupt(target: Path, number: int) -> int:
    """Start a program that writes a folder, and end it in the middle; returns its status."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE, str(target)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    process.send_signal(number)
    return process.wait(timeout=30)


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
    ids=["Ctrl-C", "SIGTERM", "SIGHUP"],
)
def test_interrupted(tmp_path, number, status):
    assert interrupt(tmp_path / "a" / "new", number) == status
    assert names(tmp_path) == set()


def test_killed_outright(tmp_path):
    """Nobody can clean up after SIGKILL but the next run, and it leaves live ones alone."""
    target = tmp_path / "new"
    interrupt(target, signal.SIGKILL)
    (left,) = names(tmp_path)
    assert left.startswith(".new.partial-")
    (tmp_path / ".other.partial-1").mkdir()
    with atomic_directory(target, 10) as first:
        with pytest.raises(RuntimeError), atomic_directory(target, 10) as second:
            assert names(tmp_path) == {first.name, second.name, ".other.partial-1"}
            raise RuntimeError
        assert first.is_dir()
    assert names(tmp_path) == {"new", ".other.partial-1"}


def test_names_that_are_patterns(tmp_path):
    (tmp_path / ".x.partial-1").mkdir()
    with atomic_directory(tmp_path / "[x]*", 10):
        pass
    assert names(tmp_path) == {"[x]*", ".x.partial-1"}


def test_handlers_are_put_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with atomic_directory(tmp_path / "new", 10):
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_from_a_thread(tmp_path):
    """Only the main thread may handle signals; others write all the same."""
    import threading

    def write():
        with atomic_directory(tmp_path / "new", 10):
            time.sleep(0)

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    assert names(tmp_path) == {"new"}


def test_a_refusal_clears_away_what_a_killed_run_left(tmp_path):
    target = tmp_path / "new"
    with atomic_directory(target, 10) as folder:
        (folder / "file").write_text("x")
    abandoned = tmp_path / ".new.partial-00000000"
    abandoned.mkdir()
    (abandoned / "unpacked").write_text("y")
    with pytest.raises(CheckpointError, match="exists already"), atomic_directory(target, 10):
        pass
    assert names(tmp_path) == {"new"} and names(target) == {"file"}
