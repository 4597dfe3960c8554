"""Evaluate Metal expressions, one value per thread."""

from __future__ import annotations

from collections.abc import Iterable

import metal_emulator
import mlx.core as mx
import numpy as np
from metal_emulator.arrays import to_numpy

LANES = 64


def per_thread(
    source: str,
    *inputs: mx.array,
    dtype: mx.Dtype = mx.float32,
    header: str = "",
    count: int = LANES,
) -> np.ndarray:
    """Run statements that set `y[i]` of each thread i from x0, x1, ..., and return y."""
    with metal_emulator.emulate("checked"):
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
    """Return the values per thread of several expressions, evaluated in one kernel."""
    expressions = list(expressions)
    cast = {mx.float32: "float", mx.uint32: "uint", mx.int32: "int", mx.bool_: "bool"}[dtype]
    # All threads evaluate one expression before the next: expressions may exchange values.
    lines = [f"y[i + {n * LANES}] = {cast}({e});" for n, e in enumerate(expressions)]
    with metal_emulator.emulate("checked"):
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
