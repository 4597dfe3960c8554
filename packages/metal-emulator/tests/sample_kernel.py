"""A kernel with barriers, threadgroup memory and a reference implementation, to test with."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import metal_emulator
import mlx.core as mx
import numpy as np
import pytest
from metal_emulator.arrays import to_numpy

HERE = Path(__file__).parent


def read(file: str) -> str:
    """Return a source file of the kernel."""
    return (HERE / file).read_text()


BODY = read("decayed_sum.metal")
HEADER = read("decay.metal")
INPUTS = ["x", "rate", "start", "dims"]
OUTPUTS = ["y", "last"]
DTYPES = [
    pytest.param(mx.float32, id="float32"),
    pytest.param(mx.float16, id="float16"),
    pytest.param(mx.bfloat16, id="bfloat16"),
]
# Relative to the largest value. The kernel computes in float32 and rounds y once.
TOLERANCE = {mx.float32: 1e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}


class Case(NamedTuple):
    """Inputs of the kernel: x and rate (B, L, D), start (B, D) in float32."""

    x: mx.array
    rate: mx.array
    start: mx.array


def case(batch: int, length: int, width: int, dtype: mx.Dtype, seed: int = 0) -> Case:
    """Return normally distributed inputs."""
    keys = mx.random.split(mx.random.key(seed), 3)
    shape = (batch, length, width)
    return Case(
        mx.random.normal(shape, key=keys[0]).astype(dtype),
        mx.random.normal(shape, key=keys[1]).astype(dtype),
        mx.random.normal((batch, width), key=keys[2]),
    )


def make(body: str = BODY, header: str = HEADER) -> Any:
    """Build the kernel, or a changed copy, with the current `mx.fast.metal_kernel`."""
    return mx.fast.metal_kernel(
        name="decayed_sum", input_names=INPUTS, output_names=OUTPUTS, source=body, header=header
    )


def call(kernel: Any, given: Case, simdgroups: int = 4, steps: int = 4) -> list[mx.array]:
    """Run the kernel and return y and last."""
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
    """Return y and last, computed in float64."""
    x, rate, h = (np.array(v.astype(mx.float32)).astype(np.float64) for v in given)
    y = np.empty_like(x)
    for t in range(x.shape[1]):
        h = h / (1 + np.exp(rate[:, t])) + x[:, t]
        y[:, t] = h
    return y, h


def relative_error(actual: mx.array, expected: np.ndarray) -> float:
    """Return the largest error, relative to the largest expected value."""
    values = np.array(actual.astype(mx.float32)).astype(np.float64)
    return float(np.abs(values - expected).max() / np.abs(expected).max())


def same_bits(a: mx.array, b: mx.array) -> bool:
    """Return whether two arrays are bitwise equal."""
    return bool(np.array_equal(to_numpy(a), to_numpy(b)))


def captured(
    body: str = BODY, header: str = HEADER, dtype: mx.Dtype = mx.bfloat16, length: int = 37
):
    """Return the capture of a call."""
    given = case(2, length, 64, dtype)
    definition = metal_emulator.KernelDefinition(
        "decayed_sum", tuple(INPUTS), tuple(OUTPUTS), body, header
    )
    captures: list[metal_emulator.Capture] = []

    def kernel(inputs: list[mx.array], **launch: Any) -> list[mx.array]:
        captures.append(metal_emulator.capture_call(definition.build(), inputs, **launch))
        return []

    call(kernel, given)
    return captures[0]
