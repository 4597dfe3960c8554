"""Reading a process's part of a checkpoint, and no more than that, where several share a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rgemma.checkpoints.safetensors import ITEM_SIZE, MLX_NAME, TensorInfo
from mlx_rgemma.errors import CheckpointError
from mlx_rgemma.griffin.sharding import cut_axis, own_part, span

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
        axis = cut_axis(name)
        if axis is not None and value.ndim == 2:
            parts[name] = _read(tensors[name], axis, rank, size)
        else:
            parts[name] = own_part(name, value, rank, size)
    return parts


def _read(info: TensorInfo, axis: int, rank: int, size: int) -> mx.array:
    """Part of a matrix: MLX would read all of it first."""
    kind = UNSIGNED[ITEM_SIZE[info.dtype]]
    place: list[Any] = [slice(None), slice(None)]
    place[axis] = span(info.shape[axis], rank, size)
    try:
        matrix = np.memmap(info.file, kind, "r", info.start, info.shape)
    except OSError as error:
        raise CheckpointError(f"{info.file}: cannot be read ({error}).") from error
    part = mx.array(np.ascontiguousarray(matrix[tuple(place)]))
    return part.view(getattr(mx, MLX_NAME[info.dtype]))
