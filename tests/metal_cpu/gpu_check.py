"""Run recorded kernels on an NVIDIA GPU and compare them with what the CPU made of the same text.

    python tests/metal_cpu/gpu_check.py --record kernels/    # anywhere: execute and write to files
    python tests/metal_cpu/gpu_check.py kernels/             # on a machine with an NVIDIA GPU

The second needs NumPy, NVIDIA's driver, and NVRTC or nvcc; neither MLX nor PyTorch. For each launch
it compares the outputs, repeats the launch to see whether the bits ever change, and says what
bandwidth it reached beside that of a copy from device to device. Races that only a GPU shows:

    compute-sanitizer --tool racecheck python tests/metal_cpu/gpu_check.py kernels/

Where something is missing it says `skipped:` and why, and ends with 0; a wrong result ends with 1.
So far it has run against a stand-in for the driver only, not on a GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from metal_cpu.cuda_compiler import CudaCompiler, CudaError, cuda_toolchain
from metal_cpu.cuda_driver import Gpu, Memory
from metal_cpu.recorded import RecordedBuffer, RecordedLaunch, load, save

# Relative to the largest value: both compute in float32 in the same order, with other exp and sqrt.
TOLERANCE = {"float32": 2e-5, "float16": 2.0**-9, "bfloat16": 2.0**-6}
REPEATS = 20


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="where the recorded launches are")
    parser.add_argument(
        "--record", action="store_true", help="execute the project's kernels and write them there"
    )
    options = parser.parse_args(arguments)
    if options.record:
        return record_project(options.folder)
    launches = load(options.folder)
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
    """Say why there is nothing to report."""
    print(f"skipped: {reason}")
    return 0


def check(gpu: Gpu, compiler: CudaCompiler, launches: Sequence[RecordedLaunch]) -> int:
    """Run all launches and print a line for each; 1 if any is wrong."""
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
    """Run one launch: whether it is wrong, and a line about it.

    Args:
        gpu: where to run it.
        compiler: what to compile it with.
        launch: what to run.
        copy: bytes per second of a copy, to compare with.
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
        return True, f"WRONG other bits in another run          {timing}"
    if not launch.has_values:
        return False, f"timed, not compared                       {timing}"
    errors = {
        buffer.name: relative_error(buffer, result, launch.values[buffer.name])
        for buffer, result in zip(outputs, results[0], strict=True)
    }
    shown = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    bounds = {buffer.name: TOLERANCE.get(buffer.type, 0.0) for buffer in outputs}
    # A NaN is not within any bound.
    wrong = not all(errors[name] <= bound for name, bound in bounds.items())
    return wrong, f"{'WRONG' if wrong else 'right'} {shown:36s} {timing}"


def contents_before(launch: RecordedLaunch, buffer: RecordedBuffer) -> np.ndarray[Any, Any]:
    """What a buffer holds when the kernel starts."""
    values = empty(buffer)
    if buffer.role == "output":
        values.reshape(-1).view(np.uint8)[...] = 0xFF  # NaN: what is not written shows
    elif buffer.role == "initialised output":
        values[...] = encode(np.full(buffer.shape, launch.initial), buffer.type)
    elif buffer.name in launch.values:
        values[...] = launch.values[buffer.name]
    else:
        drawn = np.random.default_rng(0).standard_normal(buffer.shape, dtype=np.float32)
        values[...] = encode(drawn, buffer.type)
    return values


def empty(buffer: RecordedBuffer) -> np.ndarray[Any, Any]:
    """Room for a buffer's content."""
    return np.empty(buffer.shape, buffer.stored_type)


def encode(values: np.ndarray[Any, Any], kind: str) -> np.ndarray[Any, Any]:
    """Numbers as they are stored."""
    if kind != "bfloat16":
        return values.astype(kind)
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def decode(values: np.ndarray[Any, Any], kind: str) -> np.ndarray[Any, Any]:
    """Stored numbers as float64, to compare them."""
    if kind == "bfloat16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.complex128 if values.dtype.kind == "c" else np.float64)


def relative_error(
    buffer: RecordedBuffer, actual: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]
) -> float:
    """Largest difference relative to the largest expected value; 0 for an empty output."""
    if expected.size == 0:
        return 0.0
    exact = decode(expected, buffer.type)
    difference = np.abs(decode(actual, buffer.type) - exact).max()
    return float(difference / max(np.abs(exact).max(), 1e-30))


def record_project(folder: Path) -> int:
    """Execute every variant of the project's kernels on its example and workload, and save them."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from metal_cpu.record import recorded_launch
    from metal_cpu.toolchain import compiler

    found, reason = compiler()
    if found is None:
        return skipped(reason)
    launches = [recorded_launch(launch) for launch in project_launches()]
    files = save(launches, folder)
    print(f"{len(files)} launches in {folder}, {sum(f.stat().st_size for f in files) >> 10} KB")
    return 0


def project_launches() -> list[Any]:
    """Launches of all registered kernels of `mlx_rgemma.ops`, with their values."""
    import importlib
    import pkgutil

    import mlx.core as mx

    import metal_cpu
    import mlx_rgemma.ops

    for module in pkgutil.iter_modules(mlx_rgemma.ops.__path__):
        importlib.import_module(f"mlx_rgemma.ops.{module.name}")
    from mlx_rgemma.ops import kernels

    launches: list[Any] = []
    with metal_cpu.executed(record=launches, keep_values=True), kernels.plain_only():
        for kernel in kernels.registered():
            for variant in kernel.variants:
                mx.eval(kernel.launch(*kernel.example(*variant)))
            if kernel.workload is not kernel.example:
                mx.eval(kernel.launch(*kernel.workload(*kernel.variants[0])))
    return launches


if __name__ == "__main__":
    sys.exit(main())
