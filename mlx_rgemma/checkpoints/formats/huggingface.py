"""Checkpoint folders in Hugging Face's layout: configuration, index and headers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_rgemma.errors import CheckpointError, ConfigError, shortened, shown
from mlx_rgemma.griffin.config import GriffinConfig
from mlx_rgemma.io.reading import read_json
from mlx_rgemma.io.safetensors import MAX_TENSORS, TensorInfo, read_header

if TYPE_CHECKING:
    import mlx.core as mx

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
WEIGHT_FILES = ("model*.safetensors", "weights*.safetensors")
OTHER_FORMATS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.npz", "*.gguf")
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")


@dataclass(frozen=True)
class CheckpointFolder:
    """A folder in Hugging Face's layout with validated headers; its tensors are not read yet.

    Attributes:
        path: The folder.
        values: Its `config.json`, with the end-of-text tokens of `generation_config.json` added.
        config: The validated configuration.
        tensors: All tensors of its weight files, by name.
        read: Reader of a tensor, if the files are in another format.
    """

    path: Path
    values: dict[str, Any]
    config: GriffinConfig
    tensors: dict[str, TensorInfo]
    read: Callable[[str], mx.array] | None = None

    @classmethod
    def open(cls, path: Path) -> CheckpointFolder:
        """Read the configuration and the headers of all weight files.

        Raises:
            CheckpointError: If a file is missing or damaged, or the configuration is wrong.
        """
        if not path.exists():
            raise CheckpointError(f"{path}: no such folder.")
        if not path.is_dir():
            kind = "a file" if path.is_file() else "neither a regular file nor a folder"
            raise CheckpointError(f"{path}: {kind}; give the folder that holds the model.")
        values = read_config(path)
        try:
            config = GriffinConfig.from_dict(values)
        except ConfigError as error:
            raise CheckpointError(f"{path / CONFIG}: {error}") from error
        return cls(path, values, config, _read_headers(path))

    @property
    def files(self) -> list[Path]:
        """The weight files."""
        return list(dict.fromkeys(info.file for info in self.tensors.values()))


def read_config(folder: Path) -> dict[str, Any]:
    """Return a folder's `config.json`, with the end-of-text tokens of `generation_config.json`.

    Raises:
        CheckpointError: If there is no configuration or it is not a JSON object.
    """
    path = folder / CONFIG
    if not path.exists():
        raise CheckpointError(f"{path}: no such file; is this the folder of a model?")
    values = read_json(path)
    generation = folder / GENERATION_CONFIG
    if generation.is_file():
        stops = [v for source in (values, read_json(generation)) for v in _stops(source)]
        if stops:
            if all(type(stop) is int for stop in stops):
                stops = list(dict.fromkeys(stops))
            values["eos_token_id"] = stops if len(stops) > 1 else stops[0]
    return values


def _stops(values: dict[str, Any]) -> list[Any]:
    found = values.get("eos_token_id")
    return found if isinstance(found, list) else [] if found is None else [found]


def _read_headers(folder: Path) -> dict[str, TensorInfo]:
    index = folder / INDEX
    places = _read_index(index) if index.is_file() else None
    if places is None:
        files = _weight_files(folder)
    else:
        files = [folder / name for name in sorted(set(places.values()))]
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise _missing_shards(folder, absent)
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in read_header(file).items():
            if name in tensors:
                raise CheckpointError(
                    f"{folder}: {shown(name)} is both in {tensors[name].file.name} and in"
                    f" {file.name};"
                    " remove the file that does not belong here."
                )
            tensors[name] = info
        if len(tensors) > MAX_TENSORS:
            raise CheckpointError(f"{folder}: more than {MAX_TENSORS:,} tensors; this is refused.")
    if places is not None:
        _check_index(index, places, tensors)
    return tensors


def _read_index(path: Path) -> dict[str, str]:
    """Return the file of each tensor from an index, which may name files of its folder only."""
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{path}: no 'weight_map'; {INDEX_HINT}.")
    for name, file in places.items():
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: {shown(name)} is in {shown(file)}, which is not a safetensors file."
            )
        if re.search(r"[/\\\0]", file):
            raise CheckpointError(
                f"{path}: {shown(name)} is in {shown(file)}, outside the folder; this is refused."
            )
    return places


INDEX_HINT = "download it again, or delete it if all weight files of the folder belong together"


def _check_index(path: Path, places: dict[str, str], tensors: dict[str, TensorInfo]) -> None:
    wrong = [
        name for name in places if name not in tensors or tensors[name].file.name != places[name]
    ]
    if wrong:
        raise CheckpointError(
            f"{path}: {_count(len(wrong), 'tensor')} not in the file it names:"
            f" {shortened(f'{name} in {places[name]}' for name in wrong)}; {INDEX_HINT}."
        )
    unlisted = [
        f"{name} in {info.file.name}" for name, info in tensors.items() if name not in places
    ]
    if unlisted:
        raise CheckpointError(
            f"{path}: {_count(len(unlisted), 'tensor')} not listed: {shortened(unlisted)};"
            f" {INDEX_HINT}."
        )


def _weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a folder without index."""
    for pattern in WEIGHT_FILES:
        files = sorted(folder.glob(pattern))
        if files:
            break
    else:
        others = sorted(f.name for p in OTHER_FORMATS for f in folder.glob(p))
        found = f", only {shortened(others)}, which this package does not read" if others else ""
        raise CheckpointError(
            f"{folder}: no weights: no {SINGLE_FILE} or model-*.safetensors{found}; download the"
            " safetensors files of the model, or save it again with transformers'"
            " save_pretrained."
        )
    shards = [m for m in (SHARD.fullmatch(file.name) for file in files) if m]
    absent = []
    for stem, count in sorted({(m["stem"], m["count"]) for m in shards}):
        there = {int(m["number"]) for m in shards if (m["stem"], m["count"]) == (stem, count)}
        absent += [
            f"{stem}-{number:05d}-of-{count}.safetensors"
            for number in range(1, min(int(count), 1000) + 1)
            if number not in there
        ]
    if absent:
        raise _missing_shards(folder, absent)
    return files


def _missing_shards(folder: Path, names: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{folder}: {_count(len(names), 'weight file')} missing: {shortened(names)};"
        " download the model again."
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"
