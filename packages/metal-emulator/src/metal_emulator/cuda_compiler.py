"""Compile CUDA with NVRTC or nvcc. Neither needs a GPU, and this module does not need MLX.

Environment:
    METAL_EMULATOR_NVRTC: path of libnvrtc, if it is in none of the usual places.
    CUDA_HOME: the CUDA toolkit, `/usr/local/cuda` if unset.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import shutil
import site
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

STDLIB = Path(__file__).resolve().parent / "stdlib"


class CudaError(Exception):
    """Messages of a CUDA compiler, or an error of the driver."""


@dataclass(frozen=True)
class CudaCompiler:
    """A CUDA compiler: `nvrtc` with the path of the library, `nvcc` with that of the program."""

    kind: str
    path: str

    def compile(self, text: str, architecture: str, *, binary: bool = False) -> bytes:
        """Return PTX or machine code.

        Args:
            text: the CUDA source.
            architecture: compute capability without the dot, such as `90`.
            binary: return machine code for this architecture instead of PTX.

        Raises:
            CudaError: with the compiler's messages.
        """
        with_compiler = _with_nvrtc if self.kind == "nvrtc" else _with_nvcc
        return with_compiler(self.path, text, architecture, binary)


def cuda_toolchain() -> tuple[CudaCompiler | None, str]:
    """Return a CUDA compiler, or None and the reason."""
    library = _nvrtc_library()
    if library is not None and (_toolkit_headers() / "cuda_fp16.h").exists():
        return CudaCompiler("nvrtc", library), ""
    program = shutil.which("nvcc") or str(_cuda_home() / "bin" / "nvcc")
    if Path(program).exists():
        return CudaCompiler("nvcc", program), ""
    return None, "neither NVRTC with CUDA's headers nor nvcc is installed"


def _with_nvcc(program: str, text: str, architecture: str, binary: bool) -> bytes:
    with tempfile.TemporaryDirectory() as scratch:
        source, result = Path(scratch) / "kernel.cu", Path(scratch) / "kernel.out"
        source.write_text(text)
        command = [program, "-std=c++17", f"-arch=sm_{architecture}", "--fmad=false", "-w"]
        command += ["-cubin" if binary else "-ptx", f"-I{STDLIB}", "-o", str(result), str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise CudaError(done.stderr)
        return result.read_bytes()


def _with_nvrtc(library: str, text: str, architecture: str, binary: bool) -> bytes:
    nvrtc = ctypes.CDLL(library)
    program = ctypes.c_void_p()
    code = text.encode()
    created = nvrtc.nvrtcCreateProgram(ctypes.byref(program), code, b"kernel.cu", 0, None, None)
    if created:
        raise CudaError(f"NVRTC cannot create a program (error {created})")
    headers = _toolkit_headers()
    options = [
        "--std=c++17",
        f"--gpu-architecture={'sm' if binary else 'compute'}_{architecture}",
        "--device-as-default-execution-space",
        "--fmad=false",
        f"--include-path={STDLIB}",
        f"--include-path={headers}",
        f"--include-path={headers / 'cccl'}",
    ]
    encoded = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
    try:
        if nvrtc.nvrtcCompileProgram(program, len(options), encoded):
            raise CudaError(_nvrtc_output(nvrtc, program, "ProgramLog").decode())
        return _nvrtc_output(nvrtc, program, "CUBIN" if binary else "PTX")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _nvrtc_output(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, kind: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{kind}Size")(program, ctypes.byref(size))
    output = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{kind}")(program, output)
    return output.raw


def _cuda_home() -> Path:
    return Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))


def _toolkit_headers() -> Path:
    for root in _nvidia_packages():
        headers = root / "include"
        if (headers / "cuda_fp16.h").exists() and (headers / "cccl").exists():
            return headers
    return _cuda_home() / "include"


def _nvrtc_library() -> str | None:
    chosen = os.environ.get("METAL_EMULATOR_NVRTC")
    if chosen:
        return chosen
    for root in [*_nvidia_packages(), _cuda_home()]:
        for folder in ("lib64", "lib"):
            libraries = sorted((root / folder).glob("libnvrtc.so*"))
            if libraries:
                return str(libraries[-1])
    return ctypes.util.find_library("nvrtc")


def _nvidia_packages() -> list[Path]:
    """Return the folders of NVIDIA's Python packages."""
    folders = [Path(p) / "nvidia" for p in {*site.getsitepackages(), *sys.path}]
    return sorted(p for folder in folders if folder.exists() for p in folder.iterdir())
