"""Repeat recorded launches on an NVIDIA GPU and compare the results with those of the emulator.

    python -m metal_emulator.gpu_check kernels/

`kernels/` holds launches that `recorded_launch` and `save_launches` wrote, on any machine. The
check needs NumPy, NVIDIA's driver, and NVRTC or nvcc, but not MLX. For each launch it compares the
outputs, repeats the launch to detect results that change, and reports the bandwidth, absolute and
relative to a copy from device to device. To find races on the GPU:

    compute-sanitizer --tool racecheck python -m metal_emulator.gpu_check kernels/

The exit status is 1 for a wrong result, and 0 if something is missing, with a line `skipped:`. The
check has been tested with a fake driver only, not on a GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .cuda_compiler import CudaCompiler, CudaError, cuda_toolchain
from .cuda_driver import Gpu, Memory
from .launch_files import RecordedBuffer, RecordedLaunch, load_launches

# Relative to the largest value. Both compute in float32 in the same order, but exp and sqrt differ.
TOLERANCE = {"float32": 2e-5, "float16": 2.0**-9, "bfloat16": 2.0**-6}
REPEATS = 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="folder of the recorded launches")
    options = parser.parse_args(arguments)
    launches = load_launches(options.folder)
    if not launches:
        return skipped(f"no recorded launches in {options.folder}")
    compiler, reason = cuda_toolchain()
    if compiler is None:
        return skipped(reason)
    try:
        gpu = Gpu()
    except CudaError as error:
        return skipped(f"this needs an NVIDIA GPU: {error}")
    return check(gpu, compiler, launches)


def skipped(reason: str) -> int:
    """Print why nothing was checked, and return the exit status."""
    print(f"skipped: {reason}")
    return 0


def check(gpu: Gpu, compiler: CudaCompiler, launches: Sequence[RecordedLaunch]) -> int:
    """Run all launches, print a line per launch, and return 1 if a result is wrong."""
    copy = gpu.copy_bandwidth()
    print(f"{gpu.name}, compute capability {gpu.architecture}, {compiler.kind}")
    print(f"copy from device to device: {copy / 1e9:.0f} GB/s read and written")
    wrong = 0
    for launch in launches:
        try:
            fault, report = check_launch(gpu, compiler, launch, copy)
        except CudaError as error:
            fault, report = True, f"WRONG {str(error).strip()}"
        wrong += fault
        print(f"{launch.name:40s} {report}")
    print(f"{len(launches) - wrong} of {len(launches)} launches are right")
    return 1 if wrong else 0


def check_launch(
    gpu: Gpu, compiler: CudaCompiler, launch: RecordedLaunch, copy: float
) -> tuple[bool, str]:
    """Run one launch, and return whether it is wrong and a line about it.

    Args:
        gpu: the GPU.
        compiler: the CUDA compiler.
        launch: the launch.
        copy: bytes per second of a copy from device to device.
    """
    groups = launch.groups()
    if groups is None:
        return False, "skipped: CUDA has no partial threadgroups"
    code = compiler.compile(launch.cuda, gpu.architecture, binary=True)
    kernel = gpu.load(code, launch.entry)
    memories = {buffer.name: Memory(gpu, buffer.nbytes) for buffer in launch.buffers}
    addresses = [memories[b.name].address.value + b.origin for b in launch.buffers]
    outputs = [buffer for buffer in launch.buffers if buffer.role != "input"]
    try:
        results = []
        for _ in range(3):
            for buffer in launch.buffers:
                memories[buffer.name].write(contents_before(launch, buffer))
            kernel.launch(groups, launch.threadgroup, addresses)
            kernel.wait()
            results.append([memories[b.name].read(empty(b)) for b in outputs])
        seconds = gpu.seconds(lambda: kernel.launch(groups, launch.threadgroup, addresses), REPEATS)
    finally:
        for memory in memories.values():
            memory.free()
    speed = launch.nbytes / seconds
    timing = f"{seconds * 1e6:9.1f} us {speed / 1e9:7.0f} GB/s ({speed / copy:.0%} of a copy)"
    if len({tuple(output.tobytes() for output in result) for result in results}) > 1:
        return True, f"WRONG results differ between runs         {timing}"
    if not launch.has_values:
        return False, f"timed, not compared                       {timing}"
    errors = {
        buffer.name: relative_error(buffer, result, launch.values[buffer.name])
        for buffer, result in zip(outputs, results[0], strict=True)
    }
    shown = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    bounds = {buffer.name: TOLERANCE.get(buffer.type, 0.0) for buffer in outputs}
    # NaN is within no bound.
    wrong = not all(errors[name] <= bound for name, bound in bounds.items())
    return wrong, f"{'WRONG' if wrong else 'right'} {shown:36s} {timing}"


def contents_before(launch: RecordedLaunch, buffer: RecordedBuffer) -> np.ndarray[Any, Any]:
    """Return the content of a buffer before the launch."""
    values = empty(buffer)
    if buffer.role == "output":
        values.reshape(-1).view(np.uint8)[...] = 0xFF  # NaN reveals unwritten elements
    elif buffer.role == "initialised output":
        values[...] = encode(np.full(buffer.shape, launch.initial), buffer.type)
    elif buffer.name in launch.values:
        values[...] = launch.values[buffer.name]
    else:
        drawn = np.random.default_rng(0).standard_normal(buffer.shape, dtype=np.float32)
        values[...] = encode(drawn, buffer.type)
    return values


def empty(buffer: RecordedBuffer) -> np.ndarray[Any, Any]:
    """Return an uninitialised array for a buffer."""
    return np.empty(buffer.shape, buffer.stored_type)


def encode(values: np.ndarray[Any, Any], kind: str) -> np.ndarray[Any, Any]:
    """Return float values in the stored type."""
    if kind != "bfloat16":
        return values.astype(kind)
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def decode(values: np.ndarray[Any, Any], kind: str) -> np.ndarray[Any, Any]:
    """Return stored values as float64 or complex128."""
    if kind == "bfloat16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.complex128 if values.dtype.kind == "c" else np.float64)


def relative_error(
    buffer: RecordedBuffer, actual: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]
) -> float:
    """Return the largest error relative to the largest expected value; 0 for an empty output."""
    if expected.size == 0:
        return 0.0
    exact = decode(expected, buffer.type)
    difference = np.abs(decode(actual, buffer.type) - exact).max()
    return float(difference / max(np.abs(exact).max(), 1e-30))


if __name__ == "__main__":
    sys.exit(main())
