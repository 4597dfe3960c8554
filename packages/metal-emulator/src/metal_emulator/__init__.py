"""Run, check and mutation-test Metal compute kernels on a Linux CPU.

`emulate` replaces `mx.fast.metal_kernel`: it compiles the Metal source that MLX generates as C++,
with its own implementation of Apple's standard library, and runs the grid with one fiber per GPU
thread. `run_source` does the same for a Metal source file, without MLX. The checked mode detects
races, out-of-bounds and uninitialised accesses, divergent barriers and undefined behaviour.
`check_launch` and `check_source` check a source without running it. `mutation` tests the tests.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .capture import Capture, KernelDefinition, capture_call, capture_calls
    from .context import emulate
    from .cuda import compile_cuda, translate
    from .cuda_compiler import cuda_toolchain
    from .emulated_kernel import ArrayInfo, Launch
    from .errors import Finding, KernelError
    from .launch_check import check_launch
    from .launch_files import load_launches, save_launches
    from .recording import recorded_launch
    from .run import Buffer, Counters, Result, RunOptions, Traffic, run_source
    from .static_check import Report, check_source
    from .toolchain import compiler

# Imported on first use, as only a part of the package needs MLX.
_LAZY_IMPORTS = {
    "ArrayInfo": "emulated_kernel",
    "Buffer": "run",
    "Capture": "capture",
    "Counters": "run",
    "Finding": "errors",
    "KernelDefinition": "capture",
    "KernelError": "errors",
    "Launch": "emulated_kernel",
    "Report": "static_check",
    "Result": "run",
    "RunOptions": "run",
    "Traffic": "run",
    "capture_call": "capture",
    "capture_calls": "capture",
    "check_launch": "launch_check",
    "check_source": "static_check",
    "compile_cuda": "cuda",
    "compiler": "toolchain",
    "cuda_toolchain": "cuda_compiler",
    "emulate": "context",
    "load_launches": "launch_files",
    "recorded_launch": "recording",
    "run_source": "run",
    "save_launches": "launch_files",
    "translate": "cuda",
}

__all__ = [
    "ArrayInfo",
    "Buffer",
    "Capture",
    "Counters",
    "Finding",
    "KernelDefinition",
    "KernelError",
    "Launch",
    "Report",
    "Result",
    "RunOptions",
    "Traffic",
    "capture_call",
    "capture_calls",
    "check_launch",
    "check_source",
    "compile_cuda",
    "compiler",
    "cuda_toolchain",
    "emulate",
    "load_launches",
    "recorded_launch",
    "run_source",
    "save_launches",
    "translate",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY_IMPORTS:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f".{_LAZY_IMPORTS[name]}", __name__), name)
