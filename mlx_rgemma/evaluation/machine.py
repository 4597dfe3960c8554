"""The machine and the packages of a measurement, and the bandwidth of its memory."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rgemma import __version__
from mlx_rgemma.io.memory import physical_memory
from mlx_rgemma.ops import backend, metal

THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")

MIN_COPIED_BYTES = 256 * 2**20
"""Size of the array that is copied, unless a cache is large."""

CACHE_FACTOR = 4


def describe() -> dict[str, Any]:
    """Return facts about the machine and this package, as JSON values."""
    reason = metal.unavailable_reason()
    gpu = mx.default_device().type == mx.gpu
    return {
        "machine": platform.machine(),
        "system": _system(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "device": "gpu" if gpu else "cpu",
        "gpu": mx.device_info().get("device_name") if gpu else None,
        "memory_bytes": physical_memory(),
        "python": platform.python_version(),
        "packages": {
            "mlx-rgemma": __version__,
            **{name: package_version(name) for name in ("mlx", "mlx-lm")},
        },
        "backend": backend.active().value,
        "products": "MLX" if gpu else numpy_blas(),
        "kernels": "Metal" if reason is None else f"off: {reason}",
        "threads": {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ},
    }


def header(facts: dict[str, Any]) -> list[str]:
    """Return the lines that name a machine in a report."""
    gpu = f", GPU {facts['gpu']}" if facts["gpu"] else ""
    packages = " ".join(f"{name} {found}" for name, found in facts["packages"].items())
    threads = "".join(f", {name}={value}" for name, value in facts["threads"].items())
    return [
        f"Machine: {facts['cpu']}, {facts['cores']} cores{gpu},"
        f" {facts['memory_bytes'] / 2**30:.0f} GB, {facts['system']}",
        f"Packages: {packages}, Python {facts['python']}",
        f"Runs on: {facts['device'].upper()}; backend: {facts['backend']}; matrix products:"
        f" {facts['products']}{threads}; kernels: {facts['kernels']}",
    ]


def numpy_blas() -> str:
    """Return the name and version of NumPy's BLAS, which computes products on a Linux CPU."""
    config: Any = np.show_config(mode="dicts")
    found = config.get("Build Dependencies", {}).get("blas", {})
    return f"{found.get('name', 'unknown')} {found.get('version', '')}, in NumPy {np.__version__}"


def package_version(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def copied_bytes(caches: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Return the size of an array that fits in no cache of this machine."""
    largest = 0
    for file in caches.glob("index*/size"):
        text = file.read_text().strip()
        unit = {"K": 2**10, "M": 2**20}.get(text[-1:], 0)
        largest = max(largest, int(text[:-1]) * unit if unit else int(text))
    return max(MIN_COPIED_BYTES, CACHE_FACTOR * largest)


def copy_bandwidth(nbytes: int | None = None, repeats: int = 3) -> float:
    """Return the bytes per second that a copy reads and writes, the best of several.

    MLX copies on a GPU. On a CPU it would copy with one thread and allocate each time, so all cores
    copy from one NumPy array to another instead.

    Args:
        nbytes: Size of the array; by default `copied_bytes()`.
        repeats: Copies to time.
    """
    size = (copied_bytes() if nbytes is None else nbytes) // 4
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    seconds = copy_by_threads(size, repeats) if on_cpu else copy_by_mlx(size, repeats)
    return 2 * 4 * size / seconds


def copy_by_mlx(size: int, repeats: int) -> float:
    """Return the seconds that MLX needs to copy `size` elements of 4 bytes."""
    source = mx.zeros((size,), mx.int32)
    mx.eval(source)
    times = []
    for _ in range(repeats + 1):  # the first allocates
        begin = time.perf_counter()
        mx.eval(mx.negative(source))
        times.append(time.perf_counter() - begin)
    del source
    mx.clear_cache()
    return min(times)


def copy_by_threads(size: int, repeats: int) -> float:
    """Return the seconds that all cores together need to copy `size` elements of 4 bytes."""
    threads = os.cpu_count() or 1
    source, target = np.ones(size, np.int32), np.ones(size, np.int32)
    parts = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))
    times = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            begin = time.perf_counter()
            list(pool.map(lambda part: np.copyto(*part), parts))
            times.append(time.perf_counter() - begin)
    return min(times)


def _system() -> str:
    if platform.system() == "Darwin":
        return f"macOS {platform.mac_ver()[0]}"
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        return platform.system()


def _cpu() -> str:
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        found = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        return found or platform.machine()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} ({platform.machine()})" if names else platform.machine()
