"""Files of a Flax checkpoint that are no files of its own."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from helpers.google_files import FLAX, SAID, flax_copy, needs_tensorstore

from mlx_rgemma import convert
from mlx_rgemma.checkpoints.formats import orbax
from mlx_rgemma.errors import CheckpointError

pytestmark = needs_tensorstore
ZARR = "orbax-0.5.9-zarr"


def some_array(folder):
    return sorted(p.parent for p in folder.glob("*/.zarray"))[0]


def link(folder, elsewhere):
    array = some_array(folder)
    shutil.move(array, elsewhere)
    array.symlink_to(elsewhere)


def link_chunk(folder, elsewhere):
    chunk = next(p for p in sorted(some_array(folder).iterdir()) if p.name[0] != ".")
    shutil.move(chunk, elsewhere)
    chunk.symlink_to(elsewhere)


def pipe(folder, elsewhere):
    path = some_array(folder) / ".zarray"
    path.unlink()
    os.mkfifo(path)


def large(folder, elsewhere):
    with (some_array(folder) / ".zarray").open("a") as file:
        file.write(" " * 200_000)


def deep(folder, elsewhere):
    path = some_array(folder) / ".zarray"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "x": json.loads("[" * 99 + "]" * 99)})
    )


def large_list(folder, elsewhere):
    with (folder / "_METADATA").open("w") as file:
        file.truncate(1 << 40)


HOSTILE = {
    "array elsewhere": (link, "a link out of .*; this is refused"),
    "chunk elsewhere": (link_chunk, "a link out of .*; this is refused"),
    "pipe": (pipe, "not a regular file"),
    "large description": (large, "expected at most 100,000"),
    "deep description": (deep, "more than 50 levels"),
    "large list of arrays": (large_list, "expected at most 10,000,000"),
}


@pytest.mark.parametrize(("change", "message"), HOSTILE.values(), ids=HOSTILE)
def test_hostile(tmp_path, change, message):
    folder = flax_copy(ZARR, tmp_path / "model" / "2b")
    change(folder, tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=message):
        convert(folder, tmp_path / "out", **SAID)
    assert not (tmp_path / "out").exists()


def test_more_files_than_arrays_need(tmp_path, monkeypatch):
    monkeypatch.setattr(orbax, "MAX_FILES", 10)
    with pytest.raises(CheckpointError, match="more than 10 files"):
        convert(FLAX[ZARR], tmp_path / "out", **SAID)


def test_cache_of_the_hub(tmp_path):
    """There files are links to the blobs of the same repository."""
    repository = tmp_path / "models--google--recurrentgemma-2b-flax"
    (repository / "blobs").mkdir(parents=True)
    folder = flax_copy(ZARR, repository / "snapshots" / "abc" / "2b")
    for number, path in enumerate(sorted(p for p in folder.rglob("*") if p.is_file())):
        blob = repository / "blobs" / str(number)
        shutil.move(path, blob)
        path.symlink_to(blob)
    convert(folder, tmp_path / "out", **SAID)
