"""The same kernel text as CUDA: another compiler's eyes, and an NVIDIA GPU can run it.

`translate` makes a CUDA source from a captured Metal source. `compile_cuda` compiles it with NVRTC
or nvcc, whichever is installed; neither needs a GPU.

Environment:
    MLX_RGEMMA_NVRTC: the path of libnvrtc, where the usual places do not have it.
    CUDA_HOME: the CUDA toolkit, /usr/local/cuda if unset.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import re
import shutil
import site
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .build import STDLIB
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


@dataclass(frozen=True)
class CudaCompiler:
    """`nvrtc` with the path of its library, or `nvcc` with that of the program."""

    kind: str
    path: str


def cuda_compiler() -> tuple[CudaCompiler | None, str]:
    """A compiler for CUDA, or None and the reason why there is none."""
    library = _nvrtc_library()
    if library is not None and _toolkit_headers().exists():
        return CudaCompiler("nvrtc", library), ""
    program = shutil.which("nvcc") or str(_cuda_home() / "bin" / "nvcc")
    if Path(program).exists():
        return CudaCompiler("nvcc", program), ""
    return None, "neither NVRTC with CUDA's headers nor nvcc is installed"


def translate(source: str, function: str, instance: str = "") -> str:
    """The CUDA source of a kernel: its entry point is `metal_entry`, with one pointer a buffer.

    Args:
        source: the Metal text, as captured.
        function: the kernel's name in it.
        instance: the expression that names the instantiated function, if it is a template.
    """
    params = parameters(source, function)
    instance = instance or function
    buffers = [p for p in params if p.is_buffer]
    pointers = ", ".join(f"void* buffer{p.slot}" for p in buffers)
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
    """PTX for a translated kernel.

    Args:
        text: from `translate`.
        source: the Metal text it was made from, for messages.
        architecture: compute capability, without the dot.

    Raises:
        KernelError: with the compiler's messages, at the kernel's lines.
    """
    found, reason = cuda_compiler()
    if found is None:
        raise KernelError("cuda", [Finding(f"cannot compile CUDA: {reason}")])
    compile_with = _with_nvrtc if found.kind == "nvrtc" else _with_nvcc
    return compile_with(found.path, text, source, architecture)


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


def _with_nvcc(program: str, text: str, source: str, architecture: str) -> bytes:
    with tempfile.TemporaryDirectory() as scratch:
        cu, ptx = Path(scratch) / "kernel.cu", Path(scratch) / "kernel.ptx"
        cu.write_text(text)
        command = [program, "-std=c++17", f"-arch=sm_{architecture}", "--fmad=false", "-w", "-ptx"]
        result = subprocess.run(
            [*command, f"-I{STDLIB}", "-o", str(ptx), str(cu)], capture_output=True, text=True
        )
        if result.returncode:
            raise KernelError("cuda", _messages(result.stderr, source))
        return ptx.read_bytes()


def _with_nvrtc(library: str, text: str, source: str, architecture: str) -> bytes:
    nvrtc = ctypes.CDLL(library)
    program = ctypes.c_void_p()
    code = text.encode()
    created = nvrtc.nvrtcCreateProgram(ctypes.byref(program), code, b"kernel.cu", 0, None, None)
    if created:
        raise KernelError("cuda", [Finding(f"NVRTC cannot create a program (error {created})")])
    headers = _toolkit_headers()
    options = [
        "--std=c++17",
        f"--gpu-architecture=compute_{architecture}",
        "--device-as-default-execution-space",
        "--fmad=false",
        f"--include-path={STDLIB}",
        f"--include-path={headers}",
        f"--include-path={headers / 'cccl'}",
    ]
    encoded = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
    try:
        if nvrtc.nvrtcCompileProgram(program, len(options), encoded):
            log = _nvrtc_text(nvrtc, program, "ProgramLog").decode()
            raise KernelError("cuda", _messages(log, source))
        return _nvrtc_text(nvrtc, program, "PTX")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _nvrtc_text(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(program, text)
    return text.value


def _messages(log: str, source: str) -> list[Finding]:
    found = []
    for file, line, message in re.findall(r"^(\S+?)\((\d+)\): (?:\w+ )?error.*?: (.*)$", log, re.M):
        if Path(file).name == KERNEL_FILE:
            found.append(finding(f"does not compile as CUDA: {message}", int(line), source))
        else:
            found.append(Finding(f"does not compile as CUDA: {Path(file).name}({line}): {message}"))
    return found or [Finding("does not compile as CUDA:\n" + log[:3000])]


def _cuda_home() -> Path:
    return Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))


def _toolkit_headers() -> Path:
    for root in _nvidia_packages():
        headers = root / "include"
        if (headers / "cuda_fp16.h").exists() and (headers / "cccl").exists():
            return headers
    return _cuda_home() / "include"


def _nvrtc_library() -> str | None:
    chosen = os.environ.get("MLX_RGEMMA_NVRTC")
    if chosen:
        return chosen
    roots = [*_nvidia_packages(), _cuda_home()]
    for root in roots:
        for folder in ("lib64", "lib"):
            libraries = sorted((root / folder).glob("libnvrtc.so*"))
            if libraries:
                return str(libraries[-1])
    return ctypes.util.find_library("nvrtc")


def _nvidia_packages() -> list[Path]:
    """Where wheels of NVIDIA's packages put their files."""
    folders = [Path(p) / "nvidia" for p in {*site.getsitepackages(), *sys.path}]
    return sorted(p for folder in folders if folder.exists() for p in folder.iterdir())
