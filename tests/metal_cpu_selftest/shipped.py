"""The Metal kernels that MLX and mlx-lm ship, ready to be run."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import metal_cpu
import mlx.core as mx
import numpy as np
import pytest
from metal_cpu.build import MLX_INCLUDE, build
from metal_cpu.run import Buffer, Result, RunOptions, run

HEADERS = MLX_INCLUDE / "mlx" / "backend" / "metal" / "kernels"
_number = itertools.count()


def run_header(
    header: str,
    function: str,
    instance: str,
    buffers: list[Any],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    *,
    checked: bool = True,
    **options: Any,
) -> tuple[Result, list[np.ndarray]]:
    """Run a kernel of a header in MLX's wheel.

    Args:
        header: its path below the kernels' folder.
        function, instance: the kernel's name, and the expression that instantiates it.
        buffers: NumPy arrays for inputs, `(shape, type)` for outputs.
        grid, threadgroup: in threads.
        checked: report races and the like.
        options: further arguments of `metal_cpu.run.run`.

    Returns:
        What the runtime counted, and the outputs.
    """
    library = build(expanded(header), function, instance, checked)
    bound, outputs = [], []
    for entry in buffers:
        if isinstance(entry, tuple):
            output = np.full(entry[0], np.nan, entry[1])
            outputs.append(output)
            bound.append(Buffer(output, "output"))
        else:
            bound.append(Buffer(np.ascontiguousarray(entry)))
    result = run(library, bound, grid, threadgroup, RunOptions(checked=checked), **options)
    return result, outputs


# Included by MLX before every kernel, or put in place of it by this tool.
_IN_PRELUDE = {"utils.h", "defines.h", "bf16.h", "bf16_math.h", "complex.h", "logging.h"}
# Without address spaces the specialisations of this header are one.
_TYPE_TRAITS = """
namespace metal {
template <typename T> struct is_empty : bool_constant<__is_empty(T)> {};
template <typename T> constexpr bool is_empty_v = is_empty<T>::value;
template <typename... T> using void_t = void;
template <typename T> struct is_static : bool_constant<is_empty<remove_cv_t<T>>::value> {};
template <typename T> using pointer_element_t = remove_cv_t<remove_reference_t<decltype(*T())>>;
}
"""


def expanded(header: str) -> str:
    """A header with the headers that it includes in their places, each once."""
    seen: set[str] = set()

    def read(name: str) -> str:
        if name in seen or name in _IN_PRELUDE:
            return ""
        seen.add(name)
        if name.endswith("steel/utils/type_traits.h"):
            return _TYPE_TRAITS
        text = (HEADERS / name).read_text()
        include = r'^\s*#include "mlx/backend/metal/kernels/(.*?)"'
        return re.sub(include, lambda match: read(match.group(1)), text, flags=re.M)

    return read(header)


@contextlib.contextmanager
def mlx_lm_module(name: str, **options: Any) -> Iterator[ModuleType]:
    """A private copy of a module of mlx-lm, whose kernels run on the CPU.

    Args:
        name: below `mlx_lm`, such as `models.ssm`.
        options: of `metal_cpu.executed`.
    """
    pytest.importorskip("mlx_lm")
    package, _, module_name = f"mlx_lm.{name}".rpartition(".")
    found = importlib.util.find_spec(f"{package}.{module_name}")
    private = f"{package}._executed_{module_name}_{next(_number)}"
    spec = importlib.util.spec_from_file_location(private, Path(found.origin))
    module = importlib.util.module_from_spec(spec)
    # The module makes its kernels while it is imported, and asks for the device.
    with metal_cpu.executed(as_default_device=True, **options):
        spec.loader.exec_module(module)
        yield module


def error(actual: mx.array, expected: mx.array) -> float:
    """Largest difference, relative to the largest expected value."""
    actual, expected = actual.astype(mx.float32), expected.astype(mx.float32)
    return (mx.abs(actual - expected).max() / mx.abs(expected).max()).item()
