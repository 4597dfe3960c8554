"""Translate a kernel to CUDA, to compile it with NVIDIA's compiler and run it on its GPUs."""

from __future__ import annotations

import re
from pathlib import Path

from .cuda_compiler import CudaError, cuda_toolchain
from .errors import Finding, KernelError, finding
from .source import VECTOR_FIELDS, Parameter, for_cuda, parameters
from .toolchain import KERNEL_FILE

ENTRY = "metal_entry"
_FIELDS = {
    "position_in_grid": "blockIdx.{0} * blockDim.{0} + threadIdx.{0}",
    "position_in_group": "threadIdx.{0}",
    "group_position": "blockIdx.{0}",
    "group_size": "blockDim.{0}",
    "groups_in_grid": "gridDim.{0}",
    "grid_size": "gridDim.{0} * blockDim.{0}",
    "index_in_group": "mtl::index_in_group()",
    "lane": "mtl::index_in_group() % 32",
    "simdgroup": "mtl::index_in_group() / 32",
    "simdgroups": "(blockDim.x * blockDim.y * blockDim.z + 31) / 32",
    "simd_width": "32",
}


def translate(source: str, function: str, instance: str = "") -> str:
    """Return the CUDA source of a kernel, with `metal_entry` as entry point.

    The entry point has one pointer per buffer.

    Args:
        source: the Metal source.
        function: name of the kernel function.
        instance: expression of the instantiated function, if it is a template.
    """
    params = parameters(source, function)
    instance = instance or function
    pointers = ", ".join(f"void* buffer{p.slot}" for p in params if p.is_buffer)
    arguments = ", ".join(_argument(i, p) for i, p in enumerate(params))
    kernel = re.sub(rf"\bvoid\s+{function}\s*\(", f"__device__ void {function}(", for_cuda(source))
    return f"""#include "metal_on_cuda.h"
#line 1 "{KERNEL_FILE}"
{kernel}
#line 1 "entry.cu"
using mtl_signature = mtl::signature<decltype(&{instance})>;
extern "C" __global__ void {ENTRY}({pointers}) {{
{_thread_fields(params)}  {instance}({arguments});
}}
"""


def compile_cuda(text: str, source: str, architecture: str = "90") -> bytes:
    """Return the PTX of a translated kernel.

    Args:
        text: the CUDA source, from `translate`.
        source: the Metal source, for messages.
        architecture: compute capability without the dot.

    Raises:
        KernelError: with the compiler's messages and the lines of the kernel.
    """
    found, reason = cuda_toolchain()
    if found is None:
        raise KernelError("cuda", [Finding(f"cannot compile CUDA: {reason}")])
    try:
        return found.compile(text, architecture)
    except CudaError as error:
        raise KernelError("cuda", _messages(str(error), source)) from error


def _argument(position: int, parameter: Parameter) -> str:
    kind = f"mtl_signature::argument<{position}>"
    if parameter.is_buffer:
        return f"mtl::buffer<{kind}>::from(buffer{parameter.slot})"
    if parameter.field in VECTOR_FIELDS:
        return f"mtl::position<{kind}>({parameter.field})"
    return f"{kind}({_FIELDS[parameter.field]})"


def _thread_fields(params: list[Parameter]) -> str:
    lines = ""
    for field in dict.fromkeys(p.field for p in params):
        if field in VECTOR_FIELDS:
            values = ", ".join(_FIELDS[field].format(axis) for axis in "xyz")
            lines += f"  const uint32_t {field}[3] = {{{values}}};\n"
    return lines


def _messages(log: str, source: str) -> list[Finding]:
    found = []
    for file, line, message in re.findall(r"^(\S+?)\((\d+)\): (?:\w+ )?error.*?: (.*)$", log, re.M):
        if Path(file).name == KERNEL_FILE:
            found.append(finding(f"does not compile as CUDA: {message}", int(line), source))
        else:
            found.append(Finding(f"does not compile as CUDA: {Path(file).name}({line}): {message}"))
    return found or [Finding("does not compile as CUDA:\n" + log[:3000])]
