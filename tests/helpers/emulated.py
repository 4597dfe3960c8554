"""Run operations with their Metal kernels emulated on the CPU, and compare with float64."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import metal_emulator
import mlx.core as mx
import numpy as np
import pytest

from helpers.float64 import Array, to64
from mlx_rgemma.ops import backend, metal
from mlx_rgemma.ops.backend import Backend

_compiler, _reason = metal_emulator.compiler()
needs_compiler = pytest.mark.skipif(
    _compiler is None, reason=f"kernels are not emulated: {_reason}"
)

FLOATS = {"fp32": mx.float32, "bf16": mx.bfloat16, "fp16": mx.float16}
SCHEDULES = [("fast", "forward"), ("checked", "reverse"), ("checked", "random")]
"""Values in order of the threads; races and stray accesses in other orders."""

# Relative to the largest value: what float32 can do in a scan of hundreds of steps.
FORWARD_RTOL, GRADIENT_RTOL = 5e-6, 2e-5
# Half of the distance between two neighbours: rounding a float32 result once.
ROUNDING = {mx.float32: 0.0, mx.bfloat16: 2.0**-8, mx.float16: 2.0**-11}


@contextlib.contextmanager
def emulated(
    mode: str = "fast", order: str = "forward", *, validate: bool = False, **options
) -> Iterator[list[metal_emulator.Launch]]:
    """Use the METAL backend, its kernels emulated on the CPU; yields the launches as they come.

    Args:
        mode, order, options: Of `metal_emulator.emulate`.
        validate: Validate kernels before their first launch, as on a Mac.
    """
    launches: list[metal_emulator.Launch] = []
    metal.reset()
    with (
        backend.use(Backend.METAL),
        contextlib.nullcontext() if validate else metal.skip_validation(),
        metal_emulator.emulate(mode, order, record=launches, **options),
    ):
        yield launches
    metal.reset()


IMPLEMENTATIONS = ["default", "reference", pytest.param("emulated", marks=needs_compiler)]


@contextlib.contextmanager
def run_by(implementation: str, kernel: str = "") -> Iterator[None]:
    """Run operations on one of `IMPLEMENTATIONS`.

    Args:
        implementation: ``default`` for the active backend, ``reference`` for plain MLX, or
            ``emulated``.
        kernel: A kernel that must be launched when it is ``emulated``.
    """
    if implementation == "emulated":
        with emulated() as launches:
            yield
        assert not kernel or kernel in launched(launches)
    else:
        reference = implementation == "reference"
        with backend.use(Backend.MLX) if reference else contextlib.nullcontext():
            yield


def launched(launches: list[metal_emulator.Launch]) -> list[str]:
    """Names of the kernels, without the package's prefix."""
    return [launch.name.removeprefix("mlx_rgemma_") for launch in launches]


def assert_close(name: str, actual: mx.array, exact: Array, rtol: float) -> None:
    """Within `rtol` of the largest exact value, and in half precision one rounding more."""
    assert actual.shape == exact.shape, name
    allowed = ROUNDING[actual.dtype] * np.abs(exact) + rtol * np.abs(exact).max(initial=0.0)
    excess = np.abs(to64(actual) - exact) - allowed
    assert np.isfinite(to64(actual)).all(), f"{name} is not finite"
    assert (excess <= 0).all(), (
        f"{name} is {excess.max():.1e} beyond the bound at {excess.argmax()}"
    )
