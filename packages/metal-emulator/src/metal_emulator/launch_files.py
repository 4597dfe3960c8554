"""Files of recorded launches, to repeat them on another machine. Does not need MLX.

A launch is an `.npz` file. `launch` is JSON with the CUDA source, the geometry and the buffers. The
other arrays are the contents of the buffers: inputs before the launch, outputs after it. Large
float arrays are left out: such a launch is timed with random inputs, not compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from .run import Triple


@dataclass(frozen=True)
class RecordedBuffer:
    """Description of a buffer argument.

    Attributes:
        name: name of the kernel's parameter.
        role: `input`, `output` or `initialised output`.
        type: NumPy's name of the element type, or `bfloat16`, which is stored as uint16.
        shape: shape of the stored array.
        origin: byte that the kernel's pointer points to.
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
    """A recorded launch.

    Attributes:
        name: name of the kernel.
        cuda: its CUDA source.
        entry: name of the CUDA function.
        grid, threadgroup: threads per dimension.
        initial: initial value of all elements of initialised outputs.
        buffers: the buffers, in the order of the function's parameters.
        values: contents by buffer name; incomplete for a launch that is only timed.
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
        """Whether all contents are stored, so that the results can be compared."""
        return all(buffer.name in self.values for buffer in self.buffers)

    @property
    def nbytes(self) -> int:
        """Total size of the buffers: the minimum traffic of a kernel that uses all of them."""
        return sum(buffer.nbytes for buffer in self.buffers)

    def groups(self) -> Triple | None:
        """Return the thread blocks per dimension, or None if the grid is no multiple of them."""
        if any(g % t for g, t in zip(self.grid, self.threadgroup, strict=True)):
            return None
        x, y, z = (g // t for g, t in zip(self.grid, self.threadgroup, strict=True))
        return x, y, z


def save_launches(launches: Iterable[RecordedLaunch], folder: str | Path) -> list[Path]:
    """Write each launch to a file, and return the files."""
    folder = Path(folder)
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


def load_launches(folder: str | Path) -> list[RecordedLaunch]:
    """Return the launches of a folder, in the order in which they were saved."""
    launches = []
    for path in sorted(Path(folder).glob("*.npz")):
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
