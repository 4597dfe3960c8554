"""What a measurement was made on, and with."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mlx_rgemma.measurement.memory import physical_memory

THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


def describe() -> dict[str, Any]:
    """The machine, and this package in it."""
    import mlx.core as mx

    from mlx_rgemma import __version__
    from mlx_rgemma.ops import metal

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
            **{name: _version(name) for name in ("mlx", "mlx-lm")},
        },
        "blas": _numpy_blas() if not gpu else "MLX",
        "kernels": "Metal" if reason is None else f"off: {reason}",
        "threads": {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ},
    }


def describe_peer(name: str) -> dict[str, Any]:
    """What an engine that is compared with runs on."""
    if name == "transformers":
        import torch

        own = "MKL" if torch.backends.mkl.is_available() else "its own BLAS"
        onednn = " and oneDNN" if torch.backends.mkldnn.is_available() else ""
        return {
            "packages": {package: _version(package) for package in ("transformers", "torch")},
            "blas": f"{own}{onednn}, in the torch wheel",
            "cores": torch.get_num_threads(),
        }
    return {"packages": {"mlx-lm": _version("mlx-lm")}, "blas": "of MLX's wheel or the system"}


def header(facts: dict[str, Any], peers: dict[str, dict[str, Any]]) -> list[str]:
    """The lines that name a machine, for a person."""
    gpu = f", GPU {facts['gpu']}" if facts["gpu"] else ""
    packages = " ".join(f"{name} {found}" for name, found in facts["packages"].items())
    threads = "".join(f", {name}={value}" for name, value in facts["threads"].items())
    lines = [
        f"Machine: {facts['cpu']}, {facts['cores']} cores{gpu},"
        f" {facts['memory_bytes'] / 2**30:.0f} GB, {facts['system']}",
        f"Packages: {packages}, Python {facts['python']}",
        f"Runs on: {facts['device'].upper()}; BLAS: {facts['blas']}{threads};"
        f" kernels: {facts['kernels']}",
    ]
    for name, peer in peers.items():
        packages = " ".join(f"{package} {found}" for package, found in peer["packages"].items())
        lines.append(f"Compared with {name}: {packages}; BLAS: {peer['blas']}")
    return lines


def _numpy_blas() -> str:
    """Name and version of the BLAS in NumPy's wheel, which the CPU backend multiplies with."""
    import numpy as np

    config: Any = np.show_config(mode="dicts")
    found = config.get("Build Dependencies", {}).get("blas", {})
    return f"{found.get('name', 'unknown')} {found.get('version', '')}, in NumPy {np.__version__}"


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


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
