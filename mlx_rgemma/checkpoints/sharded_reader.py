"""Reading one rank's shard of a checkpoint.

The files are read with plain system calls: a memory map, as `safetensors.safe_open` makes, would
crash the process with SIGBUS when another program truncates the file, and reads ahead by megabytes
where a shard takes only a few columns.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from io import RawIOBase

import mlx.core as mx
import numpy as np

from mlx_rgemma.errors import CheckpointError
from mlx_rgemma.griffin.parameters import shard_axis
from mlx_rgemma.griffin.sharding import local_shard, shard_slice
from mlx_rgemma.io.safetensors import ITEM_SIZE, MLX_NAME, TensorInfo

READ_AHEAD_ROWS = 1024
"""Rows that are announced to the kernel before the first is read, for a shard of columns."""

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def read_shards(
    weights: Mapping[str, mx.array], tensors: Mapping[str, TensorInfo], rank: int, size: int
) -> dict[str, mx.array]:
    """Read one rank's shards of all weights.

    Args:
        weights: All weights of a model from `Model.sanitize`, not evaluated.
        tensors: Their places in the files.
        rank: The rank.
        size: Number of ranks.

    Raises:
        CheckpointError: If a file cannot be read.
    """
    shards = {}
    for name, value in weights.items():
        axis = shard_axis(name)
        if axis is not None and value.ndim == 2:
            shards[name] = _read(tensors[name], axis, rank, size)
        else:
            shards[name] = local_shard(name, value, rank, size)
    return shards


def _read(info: TensorInfo, axis: int, rank: int, size: int) -> mx.array:
    """Read a shard of a matrix; MLX would read the whole matrix first."""
    kind = np.dtype(UNSIGNED[ITEM_SIZE[info.dtype]])
    place = shard_slice(info.shape[axis], rank, size)
    rows, columns = info.shape
    try:
        with open(info.file, "rb", buffering=0) as file:
            _advise(file, "RANDOM", 0, 0)  # otherwise the kernel reads ahead by megabytes
            if axis == 0:
                part = np.empty((place.stop - place.start, columns), kind)
                _fill(part, file, info.start + place.start * columns * kind.itemsize)
            else:
                part = np.empty((rows, place.stop - place.start), kind)
                offset = info.start + place.start * kind.itemsize
                _fill_rows(part, file, offset, columns * kind.itemsize)
    except OSError as error:
        raise CheckpointError(f"{info.file}: cannot be read ({error}).") from error
    return mx.array(part).view(getattr(mx, MLX_NAME[info.dtype]))


def _fill_rows(part: np.ndarray, file: RawIOBase, offset: int, stride: int) -> None:
    """Read the rows of a shard, which lie `stride` bytes apart."""
    for first in range(0, len(part), READ_AHEAD_ROWS):
        rows = range(first, min(first + READ_AHEAD_ROWS, len(part)))
        for row in rows:
            _advise(file, "WILLNEED", offset + row * stride, part.strides[0])
        for row in rows:
            _fill(part[row], file, offset + row * stride)


def _fill(array: np.ndarray, file: RawIOBase, offset: int) -> None:
    file.seek(offset)
    rest = array.data.cast("B")
    while rest:
        if not (count := file.readinto(rest)):
            raise OSError("it has become shorter")
        rest = rest[count:]


def _advise(file: RawIOBase, how: str, offset: int, length: int) -> None:
    """Announce the next reads to the kernel, if it supports that."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), offset, length, getattr(os, f"POSIX_FADV_{how}"))
