"""A kernel to try the tool with: barriers, threadgroup memory, several types, and its reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import metal_cpu
import mlx.core as mx
import numpy as np
import pytest
from metal_cpu.arrays import to_numpy

HERE = Path(__file__).parent
BODY = (HERE / "decayed_sum.metal").read_text()
HEADER = (HERE / "decay.metal").read_text()
INPUTS = ["x", "rate", "start", "dims"]
OUTPUTS = ["y", "last"]
DTYPES = [
    pytest.param(mx.float32, id="float32"),
    pytest.param(mx.float16, id="float16"),
    pytest.param(mx.bfloat16, id="bfloat16"),
]
# Relative to the largest value: the kernel computes in float32 and rounds y once.
TOLERANCE = {mx.float32: 1e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}


class Case(NamedTuple):
    """Inputs of the guinea pig: x and rate (B, L, D), start (B, D) float32."""

    x: mx.array
    rate: mx.array
    start: mx.array


def case(batch: int, length: int, width: int, dtype: mx.Dtype, seed: int = 0) -> Case:
    """Normal numbers."""
    keys = mx.random.split(mx.random.key(seed), 3)
    shape = (batch, length, width)
    return Case(
        mx.random.normal(shape, key=keys[0]).astype(dtype),
        mx.random.normal(shape, key=keys[1]).astype(dtype),
        mx.random.normal((batch, width), key=keys[2]),
    )


def make(body: str = BODY, header: str = HEADER) -> Any:
    """The kernel, or a changed copy of it, from whatever makes kernels now."""
    return mx.fast.metal_kernel(
        name="decayed_sum", input_names=INPUTS, output_names=OUTPUTS, source=body, header=header
    )


def call(kernel: Any, given: Case, simdgroups: int = 4, steps: int = 4) -> list[mx.array]:
    """y and last, by the kernel."""
    batch, length, width = given.x.shape
    return kernel(
        inputs=[*given, mx.array([length, width], dtype=mx.int32)],
        template=[("T", given.x.dtype), ("S", simdgroups), ("L", steps)],
        grid=(width, simdgroups, batch),
        threadgroup=(32, simdgroups, 1),
        output_shapes=[given.x.shape, given.start.shape],
        output_dtypes=[given.x.dtype, mx.float32],
    )


def reference(given: Case) -> tuple[np.ndarray, np.ndarray]:
    """y and last in float64."""
    x, rate, h = (np.array(v.astype(mx.float32)).astype(np.float64) for v in given)
    y = np.empty_like(x)
    for t in range(x.shape[1]):
        h = h / (1 + np.exp(rate[:, t])) + x[:, t]
        y[:, t] = h
    return y, h


def relative_error(actual: mx.array, expected: np.ndarray) -> float:
    """Largest difference, relative to the largest expected value."""
    values = np.array(actual.astype(mx.float32)).astype(np.float64)
    return float(np.abs(values - expected).max() / np.abs(expected).max())


def same_bits(a: mx.array, b: mx.array) -> bool:
    """Whether two arrays are equal to the last bit."""
    return bool(np.array_equal(to_numpy(a), to_numpy(b)))


def captured(
    body: str = BODY, header: str = HEADER, dtype: mx.Dtype = mx.bfloat16, length: int = 37
):
    """The generated source of a call."""
    given = case(2, length, 64, dtype)
    definition = metal_cpu.KernelDefinition(
        "decayed_sum", tuple(INPUTS), tuple(OUTPUTS), body, header
    )
    captures: list[metal_cpu.Capture] = []

    def kernel(inputs: list[mx.array], **launch: Any) -> list[mx.array]:
        captures.append(metal_cpu.capture_call(definition.build(), inputs, **launch))
        return []

    call(kernel, given)
    return captures[0]
