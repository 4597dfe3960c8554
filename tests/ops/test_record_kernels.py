"""Launches of the kernels can be recorded for an NVIDIA GPU."""

from __future__ import annotations

from helpers.emulated import needs_compiler
from helpers.kernel_runs import KERNELS
from metal_emulator import load_launches
from record_kernels import record


@needs_compiler
def test_launches_are_recorded(tmp_path):
    kernel = KERNELS["rg_lru"]
    files = record(tmp_path, [kernel])
    launches = load_launches(tmp_path)
    assert kernel.benchmark_inputs is not None  # one launch more
    assert len(files) == len(launches) == len(kernel.variants) + 1
    assert all(launch.groups() is not None for launch in launches)
    assert all("metal_entry" in launch.cuda for launch in launches)
    assert all(launch.has_values for launch in launches[:-1])
