"""Run the Metal kernels that MLX and mlx-lm ship."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import metal_emulator
import mlx.core as mx
import numpy as np
import pytest
from metal_emulator import Buffer, Result, RunOptions, run_source
from metal_emulator.build import MLX_INCLUDE

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
    function_constants: dict[int, int] | None = None,
) -> tuple[Result, list[np.ndarray]]:
    """Run a kernel of a header in MLX's wheel, and return the result and the outputs.

    Args:
        header: path of the header below the folder of kernels.
        function: name of the kernel.
        instance: expression of the instantiated kernel.
        buffers: NumPy arrays for inputs, `(shape, type)` for outputs.
        grid, threadgroup: threads per dimension.
        checked: use the checked mode.
        function_constants: values by index.
    """
    bound: list[Any] = []
    outputs = []
    for entry in buffers:
        if isinstance(entry, tuple):
            output = np.full(entry[0], np.nan, entry[1])
            outputs.append(output)
            bound.append(Buffer(output, "output"))
        else:
            bound.append(entry)
    result = run_source(
        expanded(header),
        function,
        bound,
        grid,
        threadgroup,
        RunOptions(checked=checked),
        instance=instance,
        function_constants=function_constants,
    )
    return result, outputs


# Headers that MLX includes before every kernel, or that the emulator replaces.
_IN_PRELUDE = {"utils.h", "defines.h", "bf16.h", "bf16_math.h", "complex.h", "logging.h"}
# In place of a header whose specialisations are one without address spaces.
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
    """Return a header with the headers that it includes, each once."""
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
    """Yield a private copy of a module of mlx-lm whose kernels run on the CPU.

    Args:
        name: name below `mlx_lm`, such as `models.ssm`.
        options: options of `metal_emulator.emulate`.
    """
    pytest.importorskip("mlx_lm")
    package, _, module_name = f"mlx_lm.{name}".rpartition(".")
    found = importlib.util.find_spec(f"{package}.{module_name}")
    private = f"{package}._emulated_{module_name}_{next(_number)}"
    spec = importlib.util.spec_from_file_location(private, Path(found.origin))
    module = importlib.util.module_from_spec(spec)
    # The module makes its kernels when it is imported, and reads the default device.
    with metal_emulator.emulate(as_default_device=True, **options):
        spec.loader.exec_module(module)
        yield module


def error(actual: mx.array, expected: mx.array) -> float:
    """Return the largest error, relative to the largest expected value."""
    actual, expected = actual.astype(mx.float32), expected.astype(mx.float32)
    return (mx.abs(actual - expected).max() / mx.abs(expected).max()).item()


def gated_delta_inputs(dtype, *, mask=False, vector_gate=False, length=9):
    """Return random inputs of mlx-lm's `gated_delta_kernel`."""
    keys = iter(mx.random.split(mx.random.key(0), 8))
    batch, kv_heads, heads, key_size, value_size = 2, 2, 4, 64, 8

    def normal(*shape):
        return mx.random.normal(shape, key=next(keys))

    q, k = (normal(batch, length, kv_heads, key_size) / key_size**0.5 for _ in range(2))
    v = normal(batch, length, heads, value_size)
    gate_shape = (batch, length, heads, *([key_size] if vector_gate else []))
    g = mx.random.uniform(0.7, 1.0, gate_shape, key=next(keys))
    beta = mx.sigmoid(normal(batch, length, heads))
    state = normal(batch, heads, value_size, key_size)
    kept = mx.arange(batch * length).reshape(batch, length) % 3 != 1 if mask else None
    q, k, v, beta = (x.astype(dtype) for x in (q, k, v, beta))
    return q, k, v, g, beta, state, kept
