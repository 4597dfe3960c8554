"""Time the conversion of a checkpoint of a released model's shape, with random weights.

    python -m benchmarks.convert_large --size 9b --format huggingface --folder /tmp/large

Written, timed and removed: the checkpoint (19 GB for 9B in Hugging Face's layout with its redundant
head), a copy of it (what the disk needs on its own), and its conversion to 4 bits.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_rgemma.checkpoints.formats.google import Place, place
from mlx_rgemma.checkpoints.save import split_shards
from mlx_rgemma.checkpoints.schema import TensorSpec, expected_tensors
from mlx_rgemma.griffin.config import PRESETS, GriffinConfig
from mlx_rgemma.io.safetensors import TensorInfo, write_file
from tests.helpers.google_files import torch_entry, torch_pickle, torch_zip

BLOCK = 1 << 24


class Noise:
    """Normal values in bfloat16, as bits: one block of them, begun elsewhere for each tensor."""

    def __init__(self) -> None:
        values = np.random.default_rng(0).standard_normal(BLOCK, np.float32) * 0.02
        self.block = (values.view(np.uint32) >> 16).astype(np.uint16)

    def bits(self, count: int, seed: str) -> np.ndarray:
        start = sum(seed.encode()) * 7919 % BLOCK
        repeats = -(-(count + start) // BLOCK)
        return np.tile(self.block, repeats)[start : start + count]


def huggingface(folder: Path, config: GriffinConfig, noise: Noise) -> None:
    """As Google released it there: shards of 5 GB, and a head that repeats the embedding."""
    embedding, *others = expected_tensors(config)
    tensors = [embedding, *others, replace(embedding, name="lm_head.weight")]
    infos = [TensorInfo(wanted.name, "BF16", shape_there(wanted)) for wanted in tensors]
    shards = split_shards(infos)

    def values(shard: list[TensorInfo]) -> Iterator[tuple[str, mx.array]]:
        for info in shard:
            seed = info.name.replace("lm_head", "model.embed_tokens")
            bits = noise.bits(info.nbytes // 2, seed).reshape(info.shape)
            yield info.name, mx.array(bits).view(mx.bfloat16)

    places = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / name, shard, values(shard), {"format": "pt"})
        places.update({info.name: name for info in shard})
        mx.clear_cache()
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config.to_dict()))


def shape_there(wanted: TensorSpec) -> tuple[int, ...]:
    if wanted.name.endswith("conv_1d.weight"):
        channels, taps, one = wanted.shape
        return channels, one, taps
    return wanted.shape


def pytorch(folder: Path, config: GriffinConfig, noise: Noise) -> None:
    """As Google's own archive has it: one file."""
    places = {p.name: p.shape for p in (place(w, False) for w in expected_tensors(config))}
    keys = {name: str(key) for key, name in enumerate(places)}
    entries = {name: torch_entry(shape, "BF16", keys[name]) for name, shape in places.items()}
    storages = (
        (keys[name], noise.bits(int(np.prod(shape)), name).data) for name, shape in places.items()
    )
    torch_zip(folder / "large.pt", torch_pickle(entries), storages)


def flax(folder: Path, config: GriffinConfig, noise: Noise) -> None:
    """As Orbax writes it: OCDBT, each array one chunk, compressed."""
    import tensorstore

    base = {"driver": "file", "path": f"{folder.resolve()}/"}
    for name, shape in {p.name: p.shape for p in map(flax_place, expected_tensors(config))}.items():
        metadata = {
            "shape": shape,
            "chunks": shape,
            "dtype": "bfloat16",
            "fill_value": None,
            "compressor": {"id": "zstd", "level": 1},
        }
        array = tensorstore.open(
            {
                "driver": "zarr",
                "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"},
                "metadata": metadata,
                "create": True,
            },
            context=tensorstore.Context({"file_io_sync": False}),
        ).result()
        values = noise.bits(int(np.prod(shape)), name).view(array.dtype.numpy_dtype)
        array.write(values.reshape(shape)).result()


def flax_place(wanted: TensorSpec) -> Place:
    return place(wanted, True)


FORMATS = {"huggingface": huggingface, "pytorch": pytorch, "flax": flax}


def write(kind: str, folder: Path, size: str) -> None:
    FORMATS[kind](folder, PRESETS[size], Noise())


def drop_page_cache(folder: Path) -> None:
    """Drop a folder from the page cache."""
    for path in filter(Path.is_file, folder.rglob("*")):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy_seconds(source: Path, target: Path) -> float:
    """Return the seconds that the disk needs to copy a folder."""
    drop_page_cache(source)
    start = time.perf_counter()
    shutil.copytree(source, target)
    for path in filter(Path.is_file, target.rglob("*")):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=PRESETS, default="2b")
    parser.add_argument("--format", choices=FORMATS, default="huggingface")
    parser.add_argument("--folder", type=Path, required=True, help="A new folder, removed again.")
    args, options = parser.parse_known_args()
    source, target = args.folder / "source", args.folder / "converted"
    source.mkdir(parents=True)
    try:
        # In a process of its own: Linux counts the peak of the parent as its children's.
        context = multiprocessing.get_context("spawn")
        writer = context.Process(target=write, args=(args.format, source, args.size))
        writer.start()
        writer.join()
        size = sum(path.stat().st_size for path in source.rglob("*"))
        copied = copy_seconds(source, args.folder / "copy")
        drop_page_cache(source)
        command = [sys.executable, "-m", "mlx_rgemma.convert", "--hf-path", str(source)]
        start = time.perf_counter()
        process = subprocess.Popen(
            [*command, "--mlx-path", str(target), *(options or ["-q"])], stderr=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)
        converted = time.perf_counter() - start
        if status:
            raise SystemExit("the conversion failed")
        # Kilobytes on Linux, bytes on a Mac.
        unit = 1 if sys.platform == "darwin" else 1024
        peak = usage.ru_maxrss * unit
        written = sum(path.stat().st_size for path in target.iterdir())
        print(f"source {size / 1e9:.2f} GB, converted {written / 1e9:.2f} GB")
        print(f"peak resident size {peak / 1e9:.2f} GB")
        print(f"conversion {converted:.0f} s; the disk's own copy of the source {copied:.0f} s")
    finally:
        shutil.rmtree(args.folder)


if __name__ == "__main__":
    main()
