"""Launches in files, to be repeated on another machine. Nothing here needs MLX.

A launch is one `.npz` file: `launch` is JSON (the CUDA text, the geometry, the buffers), the other
arrays are the buffers' contents: of an input what the kernel read, of an output what it wrote.
Large arrays of floats are left out: they are drawn anew, and the launch is only timed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class RecordedBuffer:
    """A buffer that the kernel was bound to.

    Attributes:
        name: of the kernel's parameter.
        role: `input`, `output` or `initialised output`.
        type: NumPy's name for its elements, or `bfloat16`, whose values are stored as uint16.
        shape: of the stored array.
        origin: the byte that the kernel's pointer points at.
    """

    name: str
    role: str
    type: str
    shape: tuple[int, ...]
    origin: int = 0

    @property
    def stored_type(self) -> np.dtype[Any]:
        return np.dtype(np.uint16 if self.type == "bfloat16" else self.type)

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.stored_type.itemsize


@dataclass(frozen=True)
class RecordedLaunch:
    """A launch as it is stored.

    Attributes:
        name: of the kernel.
        cuda: its CUDA source.
        entry: the name of its function.
        grid, threadgroup: in threads.
        initial: what initialised outputs are full of before, one number for all.
        buffers: in the order of the function's parameters.
        values: contents by buffer name; none for a launch that is only timed.
    """

    name: str
    cuda: str
    entry: str
    grid: Triple
    threadgroup: Triple
    initial: float
    buffers: tuple[RecordedBuffer, ...]
    values: Mapping[str, np.ndarray[Any, Any]] = field(default_factory=dict, repr=False)

    @property
    def has_values(self) -> bool:
        """Whether all contents are stored, so that results can be compared."""
        return all(buffer.name in self.values for buffer in self.buffers)

    @property
    def nbytes(self) -> int:
        """Of all buffers: what the kernel must move at least, if it uses them whole."""
        return sum(buffer.nbytes for buffer in self.buffers)

    def groups(self) -> Triple | None:
        """Thread blocks in each dimension, or None where they are no whole number."""
        if any(g % t for g, t in zip(self.grid, self.threadgroup, strict=True)):
            return None
        x, y, z = (g // t for g, t in zip(self.grid, self.threadgroup, strict=True))
        return x, y, z


def save(launches: Iterable[RecordedLaunch], folder: Path) -> list[Path]:
    """Write each launch to a file of its own; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, launch in enumerate(launches):
        described = asdict(replace(launch, values={}))
        del described["values"]
        path = folder / f"{number:03d}-{launch.name}.npz"
        contents: dict[str, Any] = {f"buffer_{n}": values for n, values in launch.values.items()}
        np.savez_compressed(path, launch=np.array(json.dumps(described)), **contents)
        files.append(path)
    return files


def load(folder: Path) -> list[RecordedLaunch]:
    """The launches in a folder, in the order they were saved."""
    launches = []
    for path in sorted(folder.glob("*.npz")):
        with np.load(path, allow_pickle=False) as stored:
            described = json.loads(str(stored["launch"]))
            values = {
                name.removeprefix("buffer_"): stored[name]
                for name in stored.files
                if name.startswith("buffer_")
            }
        buffers = tuple(
            RecordedBuffer(**{**entry, "shape": tuple(entry["shape"])})
            for entry in described.pop("buffers")
        )
        described |= {name: tuple(described[name]) for name in ("grid", "threadgroup")}
        launches.append(RecordedLaunch(**described, buffers=buffers, values=values))
    return launches
