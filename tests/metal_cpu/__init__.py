"""Execute and check custom Metal kernels without a Mac.

MLX generates the complete Metal source of a kernel on any platform. This package takes that very text,
compiles it as C++ with a stand-in for Apple's standard library, and runs the grid on the CPU, each GPU
thread a fiber.

What it shows: the numbers, in every type and shape and thread order; in checked mode also races, accesses
out of bounds, reads of unwritten memory, outputs never written, divergent barriers and simdgroup
operations, undefined behaviour, and how often each element of each buffer is loaded and stored. The
static checks reject what Metal's compiler would.

What it cannot show: whether Apple's compiler accepts the text, register pressure, speed on a GPU, the
rounding of fast maths functions, weak memory ordering.
"""

from .capture import Capture, KernelDefinition, capture_call, capture_calls
from .errors import Finding, KernelError
from .install import ArrayInfo, Launch, executed
from .run import Counters, Traffic
from .toolchain import compiler

__all__ = [
    "ArrayInfo",
    "Capture",
    "Counters",
    "Finding",
    "KernelDefinition",
    "KernelError",
    "Launch",
    "Traffic",
    "capture_call",
    "capture_calls",
    "compiler",
    "executed",
]
