"""Conversion between MLX arrays and the memory that a kernel accesses."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

# NumPy has no bfloat16: its bits are stored as uint16.
NUMPY_TYPES = {
    mx.bool_: np.bool_,
    mx.uint8: np.uint8,
    mx.uint16: np.uint16,
    mx.uint32: np.uint32,
    mx.uint64: np.uint64,
    mx.int8: np.int8,
    mx.int16: np.int16,
    mx.int32: np.int32,
    mx.int64: np.int64,
    mx.float16: np.float16,
    mx.bfloat16: np.uint16,
    mx.float32: np.float32,
    mx.complex64: np.complex64,
}


class Strided(NamedTuple):
    """Memory of an array: `data` spans all elements, the first one at byte `origin`."""

    data: np.ndarray[Any, Any]
    origin: int
    strides: tuple[int, ...]  # in elements


def to_numpy(array: mx.array) -> np.ndarray[Any, Any]:
    """Return the elements in row-major order, bfloat16 as uint16."""
    return np.ascontiguousarray(_view(array))


def memory_of(array: mx.array) -> Strided:
    """Return the memory of an array with its own strides."""
    view = _view(array)
    if view.size == 0:
        return Strided(view.reshape(-1), 0, (0,) * view.ndim)
    steps = [(n - 1) * s for n, s in zip(view.shape, view.strides, strict=True)]
    before = -sum(step for step in steps if step < 0)
    after = sum(step for step in steps if step > 0) + view.itemsize
    span = (ctypes.c_char * (before + after)).from_address(view.ctypes.data - before)
    data = np.frombuffer(bytes(span), dtype=view.dtype)
    return Strided(data, before, tuple(s // view.itemsize for s in view.strides))


def to_mlx(values: np.ndarray[Any, Any], shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """Return a new array of `dtype` with these bits."""
    array = mx.array(values.reshape(shape))
    return array.view(mx.bfloat16) if dtype == mx.bfloat16 else array


def empty_output(
    shape: tuple[int, ...], dtype: mx.Dtype, value: Any = None
) -> np.ndarray[Any, Any]:
    """Return memory for an output, filled with `value`, or with NaN (all bits set)."""
    output: np.ndarray[Any, Any] = np.empty(shape, NUMPY_TYPES[dtype])
    if value is None:
        output.reshape(-1).view(np.uint8)[...] = 0xFF
    else:
        output[...] = to_numpy(mx.array(value, dtype=dtype))
    return output


def _view(array: mx.array) -> np.ndarray[Any, Any]:
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    mx.eval(array)
    return np.asarray(array)
