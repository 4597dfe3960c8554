"""Folders that are no checkpoint, or a broken one: one line that says what to do."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from helpers.checkpoint_files import CONFIG, INDEX, SINGLE, edit_json, golden_copy

from mlx_rgemma.checkpoints.formats.huggingface import CheckpointFolder
from mlx_rgemma.checkpoints.schema import check_contents
from mlx_rgemma.errors import CheckpointError

SHARD = "model-00002-of-00005.safetensors"


def map_of(folder: Path) -> dict[str, str]:
    return json.loads((folder / INDEX).read_text())["weight_map"]


def remap(folder: Path, name: str, file: object) -> None:
    edit_json(folder / INDEX, weight_map={**map_of(folder), name: file})


def unlist(folder: Path) -> None:
    places = map_of(folder)
    del places["model.final_norm.weight"]
    edit_json(folder / INDEX, weight_map=places)


def truncate(path: Path, by: int = 7) -> None:
    path.write_bytes(path.read_bytes()[:-by])


def only(folder: Path, name: str) -> None:
    (folder / SINGLE).unlink()
    (folder / name).write_bytes(b"x")


def as_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


NORM = "model.final_norm.weight"

BROKEN = {
    "no config": ("tiny-2b", lambda f: (f / CONFIG).unlink(), "config.json: no such file"),
    "config no JSON": (
        "tiny-2b",
        lambda f: (f / CONFIG).write_text('{\n"model_type": '),
        r"config.json: not valid JSON \(line 2\)",
    ),
    "config no text": ("tiny-2b", lambda f: (f / CONFIG).write_bytes(b"\xff"), "not valid JSON"),
    "config a list": ("tiny-2b", lambda f: (f / CONFIG).write_text("[]"), "not a JSON object"),
    "config of another model": (
        "tiny-2b",
        lambda f: edit_json(f / CONFIG, model_type="llama"),
        "config.json: model_type is 'llama'",
    ),
    "config impossible": (
        "tiny-2b",
        lambda f: edit_json(f / CONFIG, num_attention_heads=7),
        "config.json: num_attention_heads is 7, which does not divide",
    ),
    "config without a width": (
        "tiny-2b",
        lambda f: edit_json(f / CONFIG, hidden_size=None),
        "config.json: hidden_size is missing",
    ),
    "generation config no JSON": (
        "tiny-2b",
        lambda f: (f / "generation_config.json").write_text("{"),
        "generation_config.json: not valid JSON",
    ),
    "no weights": ("tiny-2b", lambda f: (f / SINGLE).unlink(), "no weights: no model.safetensors"),
    "pickle only": (
        "tiny-2b",
        lambda f: only(f, "pytorch_model.bin"),
        "only pytorch_model.bin, which this package does not read",
    ),
    "truncated": ("tiny-2b", lambda f: truncate(f / SINGLE), "model.safetensors: truncated"),
    "shard truncated": ("tiny-sharded", lambda f: truncate(f / SHARD), f"{SHARD}: truncated"),
    "shard missing": (
        "tiny-sharded",
        lambda f: (f / SHARD).unlink(),
        f"1 weight file missing: {SHARD}",
    ),
    "shard missing, no index": (
        "tiny-sharded",
        lambda f: ((f / SHARD).unlink(), (f / INDEX).unlink()),
        f"1 weight file missing: {SHARD}",
    ),
    "index no JSON": ("tiny-sharded", lambda f: (f / INDEX).write_text("{"), "index.json: not"),
    "index empty": ("tiny-sharded", lambda f: (f / INDEX).write_text("{}"), "no 'weight_map'"),
    "index above": (
        "tiny-sharded",
        lambda f: remap(f, NORM, "../model.safetensors"),
        "outside the folder",
    ),
    "index absolute": (
        "tiny-sharded",
        lambda f: remap(f, NORM, "/etc/x.safetensors"),
        "outside the folder",
    ),
    "index with a backslash": (
        "tiny-sharded",
        lambda f: remap(f, NORM, "..\\x.safetensors"),
        "outside the folder",
    ),
    "index to no file": ("tiny-sharded", lambda f: remap(f, NORM, 3), "not a safetensors file"),
    "index to a pickle": (
        "tiny-sharded",
        lambda f: remap(f, NORM, "pytorch_model.bin"),
        "not a safetensors file",
    ),
    "index to the wrong shard": (
        "tiny-sharded",
        lambda f: remap(f, NORM, SHARD),
        f"1 tensor not in the file it names: {NORM} in {SHARD}",
    ),
    "index with a tensor too many": (
        "tiny-sharded",
        lambda f: remap(f, "model.extra", SHARD),
        f"not in the file it names: model.extra in {SHARD}",
    ),
    "index with a tensor too few": (
        "tiny-sharded",
        unlist,
        f"1 tensor not listed: {NORM} in model-00005-of-00005.safetensors",
    ),
    "index larger than an index": (
        "tiny-sharded",
        lambda f: edit_json(f / INDEX, x="x" * 10_000_000),
        "expected at most 10,000,000",
    ),
    "index with a long name": (
        "tiny-sharded",
        lambda f: remap(f, "x" * 100_000, "y" * 100_000),
        "'xxxx.* is in 'yyyy",
    ),
    "config deep": (
        "tiny-2b",
        lambda f: edit_json(f / CONFIG, x=json.loads("[" * 100 + "]" * 100)),
        "more than 50 levels of brackets",
    ),
    "config with a large number": (
        "tiny-2b",
        lambda f: edit_json(f / CONFIG, x=10**4000),
        "an integer of more than 256 bits",
    ),
    "config a pipe": ("tiny-2b", lambda f: as_pipe(f / CONFIG), "not a regular file"),
    "weights a pipe": ("tiny-2b", lambda f: as_pipe(f / SINGLE), "not a regular file"),
    "tensor in two files": (
        "tiny-2b",
        lambda f: shutil.copyfile(f / SINGLE, f / "model-copy.safetensors"),
        "is both in model-copy.safetensors and in model.safetensors",
    ),
}


@pytest.mark.parametrize(("name", "damage", "message"), BROKEN.values(), ids=BROKEN)
def test_broken(tmp_path, name, damage, message):
    folder = golden_copy(name, tmp_path)
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as error:
        CheckpointFolder.open(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < len(str(folder)) + 400


def test_not_a_folder(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        CheckpointFolder.open(tmp_path / "absent")
    file = golden_copy("tiny-2b", tmp_path) / SINGLE
    with pytest.raises(CheckpointError, match="a file; give the folder that holds the model"):
        CheckpointFolder.open(file)


def test_layouts(model_name):
    from helpers.models import GOLDEN, golden_weights

    folder = CheckpointFolder.open(GOLDEN / model_name)
    weights = golden_weights(model_name)
    assert {n: i.shape for n, i in folder.tensors.items()} == {
        n: w.shape for n, w in weights.items()
    }


@pytest.mark.parametrize("names", ["model-{}.safetensors", "weights.{}.safetensors"])
def test_files_without_an_index(tmp_path, names):
    folder = golden_copy("tiny-sharded", tmp_path)
    (folder / INDEX).unlink()
    for number, file in enumerate(sorted(folder.glob("*.safetensors"))):
        file.rename(folder / names.format(number))
    opened = CheckpointFolder.open(folder)
    assert len(opened.files) == 5
    check_contents(opened)


def test_links_are_followed(tmp_path):
    """The Hub's cache is made of links to files elsewhere."""
    blobs = golden_copy("tiny-sharded", tmp_path / "blobs")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    check_contents(CheckpointFolder.open(snapshot))


@pytest.mark.parametrize(
    ("config", "generation", "stops"),
    [(1, [1, 107], (1, 107)), ([1, 5], 1, (1, 5)), (None, 7, (7,)), (1, None, (1,))],
    ids=str,
)
def test_end_of_text_tokens_of_both_files(tmp_path, config, generation, stops):
    folder = golden_copy("tiny-2b", tmp_path)
    edit_json(folder / CONFIG, eos_token_id=config)
    edit_json(folder / "generation_config.json", eos_token_id=generation)
    assert CheckpointFolder.open(folder).config.eos_token_ids == stops
