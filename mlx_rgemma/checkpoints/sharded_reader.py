"""Reading a process's part of a checkpoint, where several share a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from io import RawIOBase

import mlx.core as mx
import numpy as np

from mlx_rgemma.errors import CheckpointError
from mlx_rgemma.griffin.sharding import local_shard, shard_axis, shard_slice
from mlx_rgemma.io.safetensors import ITEM_SIZE, MLX_NAME, TensorInfo

ROWS_ASKED_FOR = 1024
"""Of a matrix that is cut by columns, so many rows are asked for before the first is read."""

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def read_parts(
    weights: Mapping[str, mx.array], tensors: Mapping[str, TensorInfo], rank: int, size: int
) -> dict[str, mx.array]:
    """What process `rank` of `size` keeps of the weights.

    Args:
        weights: All of a model's, as `Model.sanitize` gives them, left in their files.
        tensors: Where they lie.
        rank, size: Which process this is, of how many.

    Raises:
        CheckpointError: If a file cannot be read.
    """
    parts = {}
    for name, value in weights.items():
        axis = shard_axis(name)
        if axis is not None and value.ndim == 2:
            parts[name] = _read(tensors[name], axis, rank, size)
        else:
            parts[name] = local_shard(name, value, rank, size)
    return parts


def _read(info: TensorInfo, axis: int, rank: int, size: int) -> mx.array:
    """Part of a matrix: MLX would read all of it first."""
    kind = np.dtype(UNSIGNED[ITEM_SIZE[info.dtype]])
    place = shard_slice(info.shape[axis], rank, size)
    rows, columns = info.shape
    try:
        with open(info.file, "rb", buffering=0) as file:
            _advise(file, "RANDOM", 0, 0)  # or the kernel would read ahead, by megabytes
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
    """Read each row from its own place, `stride` bytes behind the one before."""
    for first in range(0, len(part), ROWS_ASKED_FOR):
        some = range(first, min(first + ROWS_ASKED_FOR, len(part)))
        for row in some:  # all of them before the first is waited for
            _advise(file, "WILLNEED", offset + row * stride, part.strides[0])
        for row in some:
            _fill(part[row], file, offset + row * stride)


def _fill(array: np.ndarray, file: RawIOBase, offset: int) -> None:
    file.seek(offset)
    rest = array.data.cast("B")
    while rest:
        if not (count := file.readinto(rest)):
            raise OSError("it has become shorter")
        rest = rest[count:]


def _advise(file: RawIOBase, how: str, offset: int, length: int) -> None:
    """Tell the kernel how a file is about to be read, where it can be told."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), offset, length, getattr(os, f"POSIX_FADV_{how}"))
