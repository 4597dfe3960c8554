"""Damaged files: a clear refusal, or a folder that loads; never a traceback, never a half."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from helpers.checkpoint_files import CONFIG, INDEX, golden_copy

from mlx_rgemma import convert, load, load_model
from mlx_rgemma.errors import UserError
from mlx_rgemma.io.hub import EMBEDDED

SHARD = "model-00003-of-00005.safetensors"
HEADER_BYTES = 4000


def truncate(rng: random.Random, content: bytearray, region: int) -> None:
    del content[rng.randrange(len(content)) :]


def flip(rng: random.Random, content: bytearray, region: int) -> None:
    for _ in range(rng.choice([1, 1, 1, 4])):
        content[rng.randrange(region)] ^= 1 << rng.randrange(8)


def cut(rng: random.Random, content: bytearray, region: int) -> None:
    at = rng.randrange(region)
    del content[at : at + rng.choice([1, 8, 100])]


def repeat(rng: random.Random, content: bytearray, region: int) -> None:
    at = rng.randrange(region)
    content[at:at] = content[at : at + rng.choice([1, 8, 100])]


def overwrite(rng: random.Random, content: bytearray, region: int) -> None:
    at = rng.randrange(region)
    content[at : at + 8] = rng.choice([b"9" * 8, b"\0" * 8, b"\xff" * 8, b'"-1[{}],', b"null,nul"])


DAMAGES = (truncate, flip, cut, repeat, overwrite)


def damage(path: Path, seed: int) -> None:
    """Damage a file; of weights, the header."""
    rng = random.Random(seed)
    content = bytearray(path.read_bytes())
    region = min(len(content), HEADER_BYTES)
    DAMAGES[seed % len(DAMAGES)](rng, content, region)
    path.write_bytes(bytes(content))


def check(source: Path, read) -> bool:
    """Read and convert a damaged checkpoint; returns whether it was still one."""
    target = source.parent / "out"
    outcomes = set()
    for work in (lambda: read(source), lambda: convert(source, target)):
        try:
            work()
            outcomes.add(True)
        except UserError as error:
            assert "\n" not in str(error) and str(error).isprintable()
            assert not target.exists()
            outcomes.add(False)
    assert len(outcomes) == 1, "loading and converting disagree"
    if target.exists():
        read(target)
        shutil.rmtree(target)
    assert {path.name for path in source.parent.iterdir()} == {source.name}
    return outcomes.pop()


@pytest.mark.parametrize("name", [CONFIG, INDEX, SHARD, "generation_config.json"])
def test_damaged_checkpoint(tmp_path, name):
    survivors = 0
    for seed in range(25):
        source = golden_copy("tiny-sharded", tmp_path / str(seed))
        damage(source / name, seed)
        survivors += check(source, load_model)
        shutil.rmtree(source.parent)
    assert survivors < 20


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damage") / "quantized"
    convert(EMBEDDED, folder, quantize=True)
    return folder


@pytest.mark.parametrize("name", [CONFIG, "model.safetensors", "tokenizer.json", "tokenizer.model"])
def test_damaged_quantized_checkpoint(quantized, tmp_path, name):
    for seed in range(15):
        source = tmp_path / str(seed) / "source"
        shutil.copytree(quantized, source)
        if name == "tokenizer.model":
            (source / "tokenizer.json").unlink()
        damage(source / name, seed)
        check(source, partial(load, verify=True))
        shutil.rmtree(source.parent)


def test_swapped_shards(tmp_path):
    source = golden_copy("tiny-sharded", tmp_path)
    one, two = (source / f"model-0000{n}-of-00005.safetensors" for n in (1, 2))
    one.rename(source / "x")
    two.rename(one)
    (source / "x").rename(two)
    assert not check(source, load_model)


def test_damaged_values_are_still_values(tmp_path):
    """Bits of the weights themselves have no checksum: what is there is what is loaded."""
    source = golden_copy("tiny-2b", tmp_path)
    path = source / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    assert check(source, load_model)


def test_command_on_damaged_files(tmp_path):
    """The same through the command: one line on stderr, status 1, nothing written."""
    source = golden_copy("tiny-2b", tmp_path / "a")
    with (source / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    done = subprocess.run(
        [sys.executable, "-m", "mlx_rgemma.convert", "--hf-path", source, "--mlx-path", "out"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
