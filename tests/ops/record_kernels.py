"""Record launches of all kernels, to repeat them on an NVIDIA GPU.

export PYTHONPATH=packages/metal-emulator/src
python tests/ops/record_kernels.py kernels/        # on Linux, with g++
python -m metal_emulator.gpu_check kernels/        # on a machine with an NVIDIA GPU
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import metal_emulator
import mlx.core as mx

from mlx_rgemma import ops  # noqa: F401  (importing them registers the kernels)
from mlx_rgemma.ops import metal


def record(folder: Path, chosen: Iterable[metal.MetalKernel]) -> list[Path]:
    """Launch all variants of some kernels on their samples, one on its benchmark inputs too.

    Returns:
        The files of the launches.
    """
    launches: list[metal_emulator.Launch] = []
    with metal_emulator.emulate(record=launches, keep_values=True):
        for kernel in chosen:
            for variant in kernel.variants:
                mx.eval(kernel.launch(*kernel.sample_inputs(*variant)))
            if kernel.benchmark_inputs is not None:
                mx.eval(kernel.launch(*kernel.benchmark_inputs(*kernel.variants[0])))
    return metal_emulator.save_launches(map(metal_emulator.recorded_launch, launches), folder)


if __name__ == "__main__":
    (folder,) = sys.argv[1:]
    print(f"{len(record(Path(folder), metal.registered()))} launches in {folder}")
