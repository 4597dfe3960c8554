"""NumPy views of MLX's arrays, and matrix products on them.

MLX's CPU build multiplies through whatever BLAS the system has, often the reference one, fifty
times slower than NumPy's own OpenBLAS. MLX's arrays are NumPy's to read and write in place once
they are evaluated, so products need no copies.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

View = np.ndarray[Any, Any]

ignore_overflow = np.errstate(over="ignore", invalid="ignore")
"""Decorator: infinities and NaN without NumPy's warnings, as MLX computes them."""


def materialize(*arrays: mx.array) -> list[View] | None:
    """Evaluate arrays and return views, floats as fp32, row-contiguous; None while tracing.

    Within `mx.compile` and `mx.vmap` arrays have no values.
    """
    found = [x.astype(mx.float32) if mx.issubdtype(x.dtype, mx.floating) else x for x in arrays]
    try:
        mx.eval(found)
    except ValueError:  # "not allowed" while a function is traced
        return None
    views = [np.asarray(x) for x in found]
    return [view if view.flags.c_contiguous else np.ascontiguousarray(view) for view in views]


def empty(shape: tuple[int, ...]) -> tuple[mx.array, View]:
    """Return a new fp32 array and a view that writes to it."""
    array = mx.zeros(shape)
    mx.eval(array)
    return array, np.asarray(array)
