"""Metal source files run and are checked without MLX."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import metal_emulator
import numpy as np
import pytest
from metal_emulator import Buffer, KernelError, RunOptions, check_source, run_source
from requirements import needs_compiler

pytestmark = needs_compiler

PACKAGE = Path(metal_emulator.__file__).resolve().parents[1]
SAXPY = """
#include <metal_stdlib>
using namespace metal;

kernel void saxpy(
    device const float* x [[buffer(0)]],
    device float* y [[buffer(1)]],
    constant float& a [[buffer(2)]],
    uint i [[thread_position_in_grid]]) {
  y[i] = fma(a, x[i], y[i]);
}
"""


def saxpy(source: str = SAXPY, role: str = "initialised output", order: str = "forward"):
    """Run saxpy on 100 elements, and return the result and y."""
    x, y = np.arange(100, dtype=np.float32), np.ones(100, np.float32)
    buffers = [x, Buffer(y, role), np.float32(2)]
    options = RunOptions(checked=True, order=order)
    return run_source(source, "saxpy", buffers, (100, 1, 1), (32, 1, 1), options), y


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_a_source_file_runs(order):
    result, y = saxpy(order=order)
    assert np.array_equal(y, 2 * np.arange(100) + 1)
    assert result.traffic["x"].loads == result.traffic["y"].stores == 100
    assert result.traffic["a"].most_loads == 100


def test_defects_are_reported():
    with pytest.raises(KernelError, match="uninitialised device memory 'y'"):
        saxpy(role="output")
    with pytest.raises(KernelError, match="out-of-bounds read of 4 B, 4 B past the end of 'x'"):
        saxpy(SAXPY.replace("x[i]", "x[i + 1]"))
    with pytest.raises(KernelError, match=r"\[saxpy\] line 10: does not compile"):
        saxpy(SAXPY.replace("fma", "fam"))
    with pytest.raises(KernelError, match="found 1 buffers, expected 3 as in the signature"):
        run_source(SAXPY, "saxpy", [np.zeros(3, np.float32)], (3, 1, 1), (32, 1, 1))


def test_a_template_is_instantiated():
    source = """
    template <typename T, int N>
    [[kernel]] void fill(device T* y, uint i [[thread_position_in_grid]]) { y[i] = T(N); }
    """
    y = np.zeros(40, np.int16)
    buffers = [Buffer(y, "output")]
    run_source(source, "fill", buffers, (40, 1, 1), (32, 1, 1), instance="fill<short, 7>")
    assert (y == 7).all()


def test_a_source_file_is_checked():
    assert check_source(SAXPY, "saxpy").findings == ()
    report = check_source(SAXPY.replace("device const", "const"), "saxpy")
    assert "no address space: 'const float* x'" in report.findings[0].message


def test_names_can_be_added():
    source = SAXPY.replace("fma(", "fmuladd(").replace(
        "kernel void", "#define fmuladd(a, b, c) metal::fma(a, b, c)\nkernel void"
    )
    source = source.replace("thread_position_in_grid", "thread_position_in_grid, raster_order")
    found = [finding.message for finding in check_source(source, "saxpy").findings]
    assert any("attribute 'raster_order' occurs in no kernel" in message for message in found)
    report = check_source(source, "saxpy", known_names=["raster_order"])
    assert not any("raster_order' occurs" in finding.message for finding in report.findings)


def test_mlx_is_not_needed():
    """The prelude has no header of MLX, and the check of names is skipped."""
    code = f"""
import sys
sys.modules["mlx"] = None  # an import of it fails
import numpy as np
import metal_emulator as emulator
from metal_emulator import mutation
source = {SAXPY!r}
y = np.ones(64, np.float32)
buffers = [np.ones(64, np.float32), emulator.Buffer(y, "initialised output"), np.float32(2)]
emulator.run_source(source, "saxpy", buffers, (64, 1, 1), (32, 1, 1))
report = emulator.check_source(source, "saxpy")
print(y.tolist() == [3.0] * 64, report.findings, *report.skipped, sep="|")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE, timeout=120
    )
    assert done.returncode == 0, done.stderr
    right, findings, *skipped = done.stdout.strip().split("|")
    assert (right, findings) == ("True", "()")
    assert "names: MLX, whose kernels have the known names, is not installed" in skipped
