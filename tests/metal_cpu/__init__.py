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

from .capture import Capture, KernelDefinition, capture_call, capture_calls
from .errors import Finding, KernelError
from .install import executed
from .run import Counters, RunOptions, Traffic
from .standin import ArrayInfo, Launch
from .static_check import Report, check_launch, check_source
from .toolchain import compiler

__all__ = [
    "ArrayInfo",
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
    "compiler",
    "executed",
]
