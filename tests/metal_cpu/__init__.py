"""Execute and check custom Metal kernels without a Mac.

MLX generates the complete Metal source of a kernel on any platform. This package takes that very
text, compiles it as C++ with a stand-in for Apple's standard library, and runs the grid on the CPU,
each GPU thread a fiber.

What it shows: the numbers, in every type and shape and order of threads; in checked mode also
races, accesses out of bounds, reads of unwritten memory, outputs never written, divergent barriers
and simdgroup operations, recursion, undefined behaviour, and how often each element of each buffer
is loaded and stored. The static checks reject what Metal's compiler would, as far as that can be
known; the same text compiles as CUDA.

What it cannot show: whether Apple's compiler accepts the text, register pressure, speed on a GPU,
the rounding of fast maths functions, weak memory ordering.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .capture import Capture, KernelDefinition, capture_call, capture_calls
    from .cuda import compile_cuda, translate
    from .cuda_compiler import cuda_toolchain
    from .errors import Finding, KernelError
    from .install import executed
    from .run import Buffer, Counters, RunOptions, Traffic
    from .standin import ArrayInfo, Launch
    from .static_check import Report, check_launch, check_source
    from .toolchain import compiler

# Imported when first used: what only compiles CUDA or drives a GPU runs without MLX.
_MODULE_OF = {
    "ArrayInfo": "standin",
    "Buffer": "run",
    "Capture": "capture",
    "Counters": "run",
    "Finding": "errors",
    "KernelDefinition": "capture",
    "KernelError": "errors",
    "Launch": "standin",
    "Report": "static_check",
    "RunOptions": "run",
    "Traffic": "run",
    "capture_call": "capture",
    "capture_calls": "capture",
    "check_launch": "static_check",
    "check_source": "static_check",
    "compile_cuda": "cuda",
    "compiler": "toolchain",
    "cuda_toolchain": "cuda_compiler",
    "executed": "install",
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
    "RunOptions",
    "Traffic",
    "capture_call",
    "capture_calls",
    "check_launch",
    "check_source",
    "compile_cuda",
    "compiler",
    "cuda_toolchain",
    "executed",
    "translate",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
