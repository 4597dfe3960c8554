"""Conversions that are killed at any moment, or whose disk fills up: nothing wrong is left."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers.checkpoint_files import all_tensors, assert_same_tensors
from helpers.google_files import SAID, TORCH, tar_of
from test_corruption import digest

from mlx_rgemma import convert, load_model
from mlx_rgemma.errors import CheckpointError
from mlx_rgemma.io import atomic
from mlx_rgemma.io.hub import EMBEDDED

KILLS = 20

KILLER = f"""
import json, os, random, signal, sys, time
from mlx_rgemma.checkpoints.convert import convert
from mlx_rgemma.checkpoints.formats import open as opening
from mlx_rgemma.tokenizers import load as tokenizer
from mlx_rgemma.checkpoints import tensors as weights
import mlx_lm.tokenizer_utils

source, folder, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])

def start(target):
    # A copy of this process, whose imports are done: killed while it converts, not before.
    child = os.fork()
    if child == 0:
        status = 1
        try:
            convert(source, target, **options)
            status = 0
        finally:
            os._exit(status)
    return child

begin = time.perf_counter()
_, status = os.waitpid(start(folder + "/whole"), 0)
assert status == 0
whole = time.perf_counter() - begin
rng = random.Random(4)
outcomes = []
for number in range({KILLS}):
    child = start(f"{{folder}}/out {{number}}")
    time.sleep(rng.uniform(0, whole))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    outcomes.append(os.WIFSIGNALED(status))
print(json.dumps(outcomes))
"""


SOURCES = {
    "quantized on the way": (None, {"quantize": True}),
    "from an archive": ("tar", SAID),
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize(("kind", "options"), SOURCES.values(), ids=SOURCES)
def test_killed_at_random_moments(tmp_path, kind, options):
    """SIGKILL, twenty times: each target is whole or absent, and can be converted to again."""
    (tmp_path / "source").mkdir()
    if kind is None:
        source = tmp_path / "source" / "embedded"
        shutil.copytree(EMBEDDED, source)
    else:
        source = tar_of(tmp_path / "source" / "x.tar.gz", TORCH)
    folder = tmp_path / "targets"
    (folder / "mine").mkdir(parents=True)
    (folder / "mine" / "model.safetensors").write_text("kept")
    before = digest(tmp_path / "source")
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(source), str(folder), json.dumps(options)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    assert len(outcomes) == KILLS and sum(outcomes) > KILLS / 2  # some are done in time
    expected = all_tensors(folder / "whole")
    whole = [n for n in range(KILLS) if (folder / f"out {n}").exists()]
    for number in whole:
        load_model(folder / f"out {number}")
        assert_same_tensors(all_tensors(folder / f"out {number}"), expected)
        assert digest(folder / f"out {number}") == digest(folder / "whole")
    left = {path.name for path in folder.iterdir()}
    partial = {name for name in left if name.startswith(".")}
    assert left - partial == {"mine", "whole", *(f"out {n}" for n in whole)}
    for path in (folder / name for name in partial):
        # The configuration comes last: what can be loaded has everything.
        assert ".partial-" in path.name
        try:
            load_model(path)
        except CheckpointError:
            continue
        assert_same_tensors(all_tensors(path), expected)
    for number in set(range(KILLS)) - set(whole):
        convert(source, folder / f"out {number}", **options)
    for number in whole:  # one may have been killed before it removed what it had unpacked
        with pytest.raises(CheckpointError, match="exists already"):
            convert(source, folder / f"out {number}", **options)
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    assert digest(tmp_path / "source") == before
    assert (folder / "mine" / "model.safetensors").read_text() == "kept"


@contextmanager
def small_disk(folder: Path, nbytes: int):
    """A file system of a few megabytes."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
        failed = done.stderr.strip() if done.returncode else ""
    except OSError as error:
        failed = str(error)
    if failed:
        pytest.skip(f"a small file system cannot be mounted here ({failed})")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


FILLED = {
    "in a weight file": 200_000,
    "in the first block": 1000,
    "before the first byte": 0,
    "at the small files": 482_000,
}


@pytest.mark.parametrize("room", FILLED.values(), ids=FILLED)
@pytest.mark.parametrize("source", ["pt", "archive"])
def test_full_disk(tmp_path, monkeypatch, room, source):
    """A disk that is filled up by another program after its room was looked at."""
    path = TORCH if source == "pt" else tar_of(tmp_path / "x.tar.gz", TORCH)
    with small_disk(tmp_path / "disk", 8_000_000) as disk:
        (disk / "mine").mkdir()
        (disk / "mine" / "file").write_text("kept")
        convert(path, disk / "first", **SAID)
        first = digest(disk / "first")
        free = shutil.disk_usage(disk).free
        (disk / "other program").write_bytes(bytes(free - room - free % 4096))
        with pytest.raises(CheckpointError, match=r"needs .* but its disk has"):
            convert(path, disk / "out", **SAID)
        monkeypatch.setattr(atomic, "check_room", lambda path, nbytes: None)
        monkeypatch.setattr(
            "mlx_rgemma.checkpoints.formats.archive.check_room", lambda path, nbytes: None
        )
        with pytest.raises(CheckpointError, match="No space left on device") as error:
            convert(path, disk / "out", **SAID)
        assert str(error.value).isprintable()
        assert {p.name for p in disk.iterdir()} == {"mine", "first", "other program"}
        assert digest(disk / "first") == first
        assert (disk / "mine" / "file").read_text() == "kept"
        (disk / "other program").unlink()
        convert(path, disk / "out", **SAID)
        assert digest(disk / "out") == first
