"""Every file of every format truncated, bit-flipped or swapped: refused, or read as it is.

What carries a checksum (`.pt` and `.tar.gz` files, the database of OCDBT, and what this package
wrote) is never read wrongly. Other safetensors files and zarr chunks carry none: a flipped bit
there gives another value, which nobody can know, but never another tensor, shape or dtype.
"""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import pytest
from helpers.checkpoint_files import all_tensors
from helpers.google_files import FLAX, SAID, TORCH, needs_tensorstore, tar_of
from helpers.models import GOLDEN

from mlx_rgemma import convert, load_model
from mlx_rgemma.errors import UserError
from mlx_rgemma.io.hub import EMBEDDED


@dataclass(frozen=True)
class Case:
    """A format to damage.

    Attributes:
        cases: How many damages.
        summed: Whether checksums cover everything.
    """

    cases: int
    summed: bool = False


CASES = {
    "huggingface": Case(24),
    "sharded": Case(24),
    "quantized": Case(20, summed=True),
    "pytorch": Case(40, summed=True),
    "archive": Case(24, summed=True),
    **{name: Case(30) for name in FLAX},
}


def make(name: str, folder: Path) -> tuple[Path, Path]:
    """A sound checkpoint; returns the folder to damage files in, and the path to convert."""
    if name in FLAX:
        shutil.copytree(FLAX[name], folder)
        return folder, folder
    if name == "quantized":
        convert(EMBEDDED, folder, quantize=True)
        return folder, folder
    if name in ("huggingface", "sharded"):
        source = GOLDEN / {"huggingface": "tiny-2b", "sharded": "tiny-sharded"}[name]
        shutil.copytree(source, folder)
        return folder, folder
    folder.mkdir(parents=True)
    if name == "pytorch":
        shutil.copyfile(TORCH, folder / TORCH.name)
        return folder, folder / TORCH.name
    tar_of(folder / "tiny-2b.tar.gz", TORCH, EMBEDDED / "tokenizer.model")
    return folder, folder / "tiny-2b.tar.gz"


def damages(folder: Path, count: int) -> Iterator[tuple[str, list[Path]]]:
    """Damage files in turn, each in another way; yields what was done to which."""
    rng = random.Random(f"{folder.name} {count}")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    order = [files[i % len(files)] for i in range(max(count, len(files)))]
    chosen = order if len(files) <= count else rng.sample(files, count)
    for i, path in enumerate(chosen[:count]):
        original = path.read_bytes()
        # Files that come round again are damaged in another way.
        how = ("truncate", "flip", "swap")[(i + i // len(files)) % 3]
        if how == "swap" and len(files) > 1:
            other = rng.choice([file for file in files if file != path])
            second = other.read_bytes()
            path.write_bytes(second)
            other.write_bytes(original)
            yield how, [path, other]
            other.write_bytes(second)
        elif how == "truncate":
            path.write_bytes(original[: rng.randrange(len(original))])
            yield how, [path]
        else:
            content = bytearray(original)
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            path.write_bytes(content)
            yield "flip", [path]
        path.write_bytes(original)


def digest(folder: Path) -> str:
    """Return the SHA-256 of a folder: the name and the bytes of every file."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        total.update(str(path.relative_to(folder)).encode())
        total.update(path.read_bytes() if path.is_file() else b"")
    return total.hexdigest()


def differing(found: dict[str, mx.array], expected: dict[str, mx.array]) -> list[str]:
    """Tensors of other bits, in a checkpoint of the same names, shapes and dtypes."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
    return [
        name
        for name, value in expected.items()
        if not mx.array_equal(found[name].view(mx.uint8), value.view(mx.uint8)).item()
    ]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=needs_tensorstore if n in FLAX else ()) for n in CASES]
)
def test_damage(tmp_path, name):
    case = CASES[name]
    folder, source = make(name, tmp_path / "source" / name)
    options = {} if name in ("huggingface", "sharded", "quantized") else SAID
    convert(source, tmp_path / "sound", **options)
    expected, other = all_tensors(tmp_path / "sound"), tmp_path / "other target"
    other.mkdir()
    (other / "mine").write_text("kept")
    refused, tried = 0, 0
    for how, paths in damages(folder, case.cases):
        tried += 1
        what = f"{how} {[str(path.relative_to(folder)) for path in paths]}"
        before = digest(folder)
        try:
            convert(source, tmp_path / "out", **options)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and str(error).isprintable(), what
            assert not (tmp_path / "out").exists(), what
        else:
            load_model(tmp_path / "out")
            odd = differing(all_tensors(tmp_path / "out"), expected)
            values = [p for p in paths if p.suffix == ".safetensors" or p.name[0] in "0123456789"]
            allowed = 0 if case.summed or how == "truncate" else max(len(values), name in FLAX)
            # A zarr chunk of both branches of an MLP is two tensors here.
            assert len(odd) <= 2 * allowed, f"{what}: {odd}"
            shutil.rmtree(tmp_path / "out")
        assert digest(folder) == before, f"{what}: the source was changed"
        left = {path.name for path in tmp_path.iterdir()}
        assert left == {"source", "sound", other.name}, what
    assert (other / "mine").read_text() == "kept"
    assert tried == case.cases and refused > tried / 3


def test_enough_cases():
    assert sum(case.cases for case in CASES.values()) >= 200
