"""What a path holds is found out by looking, whatever it is called."""

from __future__ import annotations

import shutil
import zipfile

import pytest
from helpers.checkpoint_files import golden_copy
from helpers.google_files import FLAX, TORCH, flax_copy, tar_of
from helpers.models import GOLDEN

from mlx_rgemma import convert, load
from mlx_rgemma.checkpoints.formats.detect import CheckpointFormat, Detected, detect_format
from mlx_rgemma.errors import CheckpointError
from mlx_rgemma.io.hub import EMBEDDED


def test_kinds(tmp_path):
    assert detect_format(EMBEDDED) == Detected(CheckpointFormat.FOLDER, EMBEDDED)
    assert detect_format(GOLDEN / "tiny-2b") == Detected(
        CheckpointFormat.FOLDER, GOLDEN / "tiny-2b"
    )
    assert (
        detect_format(TORCH)
        == detect_format(TORCH.parent)
        == Detected(CheckpointFormat.PYTORCH, TORCH)
    )
    for folder in FLAX.values():
        assert detect_format(folder) == Detected(CheckpointFormat.FLAX, folder)
    for name, mode in (("a.tar", "w"), ("b.tar.gz", "w:gz"), ("c", "w:gz"), ("d.pt", "w")):
        archive = tar_of(tmp_path / name, TORCH, mode=mode)
        assert detect_format(archive) == Detected(CheckpointFormat.ARCHIVE, archive)
    for name in ("weights", "weights.bin", "archive.tar.gz"):
        shutil.copyfile(TORCH, tmp_path / name)
        assert detect_format(tmp_path / name) == Detected(CheckpointFormat.PYTORCH, tmp_path / name)


@pytest.mark.parametrize("keep", ["_METADATA", ".zarray", "manifest.ocdbt"])
def test_flax_folders_without_their_other_files(tmp_path, keep):
    folder = flax_copy("orbax-0.5.9-zarr" if "z" in keep else "orbax-0.5.9-ocdbt", tmp_path / "x")
    for name in ("_METADATA", "_sharding", "checkpoint", "manifest.ocdbt"):
        if name != keep:
            (folder / name).unlink(missing_ok=True)
    assert (
        detect_format(folder) == detect_format(tmp_path) == Detected(CheckpointFormat.FLAX, folder)
    )


def test_a_hugging_face_folder_that_holds_other_things_too(tmp_path):
    folder = golden_copy("tiny-2b", tmp_path)
    shutil.copyfile(TORCH, folder / "original.pt")
    assert detect_format(folder) == Detected(CheckpointFormat.FOLDER, folder)


def test_several(tmp_path):
    shutil.copyfile(TORCH, tmp_path / "2b.pt")
    (tmp_path / "._2b.pt").write_bytes(b"a Mac's own")
    tar_of(tmp_path / "2b.tar.gz", TORCH)
    assert detect_format(tmp_path) == Detected(CheckpointFormat.PYTORCH, tmp_path / "2b.pt")
    flax_copy("orbax-0.5.9-zarr", tmp_path / "2b-it")
    with pytest.raises(CheckpointError, match=r"more than one checkpoint: 2b-it, 2b\.pt; name one"):
        detect_format(tmp_path)


OTHERS = {
    "text": (b"hello", "x.txt", "unknown format; give the folder"),
    "empty": (b"", "x", "unknown format"),
    "safetensors": (b"\x10\0\0\0\0\0\0\0{}", "model.safetensors", "give the folder of the model"),
    "empty .pt": (b"", "x.pt", "not a valid PyTorch file"),
    "damaged .pt": (b"PK\3\4", "x.pt", "not a valid PyTorch file"),
    "empty .tar": (b"", "x.tar", "not a valid archive"),
    "damaged .gz": (b"\x1f\x8bxxxxxxxxxxxxx", "x.gz", "not a valid archive"),
}


@pytest.mark.parametrize(("content", "name", "message"), OTHERS.values(), ids=OTHERS)
def test_other_files(tmp_path, content, name, message):
    path = tmp_path / "source" / name
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        convert(path, tmp_path / "out")
    with pytest.raises(CheckpointError):
        load(path)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_zip_archives_are_to_be_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("2b/config.json", "{}")
    with pytest.raises(CheckpointError, match="a zip archive; unpack it"):
        convert(tmp_path / "x.zip", tmp_path / "out")


def test_loading_an_archive_says_to_convert_first(tmp_path):
    archive = tar_of(tmp_path / "2b.tar.gz", TORCH)
    with pytest.raises(CheckpointError, match=r"an archive; convert it first: mlx_rgemma\.convert"):
        load(archive)
