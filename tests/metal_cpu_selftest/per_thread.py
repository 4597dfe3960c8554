"""Evaluate Metal expressions, one value a thread."""

from __future__ import annotations

from collections.abc import Iterable

import metal_cpu
import mlx.core as mx
import numpy as np
from metal_cpu.arrays import to_numpy

LANES = 64


def per_thread(
    source: str,
    *inputs: mx.array,
    dtype: mx.Dtype = mx.float32,
    header: str = "",
    count: int = LANES,
) -> np.ndarray:
    """`y[i] = ...` for each thread i; inputs are x0, x1, ...; NumPy values of y."""
    with metal_cpu.executed("checked"):
        kernel = mx.fast.metal_kernel(
            name="function",
            input_names=[f"x{n}" for n in range(len(inputs))],
            output_names=["y"],
            source=f"const uint i = thread_position_in_grid.x;\n{source}",
            header=header,
        )
        (y,) = kernel(
            inputs=list(inputs),
            output_shapes=[(count,)],
            output_dtypes=[dtype],
            grid=(count, 1, 1),
            threadgroup=(min(count, LANES), 1, 1),
        )
    return to_numpy(y) if dtype == mx.bfloat16 else np.array(y)


def evaluate(
    expressions: Iterable[str], *inputs: mx.array, dtype: mx.Dtype = mx.float32
) -> dict[str, np.ndarray]:
    """The values of several expressions for each thread, from one kernel."""
    expressions = list(expressions)
    cast = {mx.float32: "float", mx.uint32: "uint", mx.int32: "int", mx.bool_: "bool"}[dtype]
    # One expression after the other, and each for all threads: they may talk to each other.
    lines = [f"y[i + {n * LANES}] = {cast}({e});" for n, e in enumerate(expressions)]
    with metal_cpu.executed("checked"):
        kernel = mx.fast.metal_kernel(
            name="functions",
            input_names=[f"x{n}" for n in range(len(inputs))],
            output_names=["y"],
            source="\n".join(["const uint i = thread_position_in_grid.x;", *lines]),
        )
        (y,) = kernel(
            inputs=list(inputs),
            output_shapes=[(len(expressions), LANES)],
            output_dtypes=[dtype],
            grid=(LANES, 1, 1),
            threadgroup=(LANES, 1, 1),
        )
    return dict(zip(expressions, np.array(y), strict=True))
