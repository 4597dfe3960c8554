"""Get the Metal source that MLX generates for a kernel call.

`mx.fast.metal_kernel` needs a Mac to run, but `mx.export_function` only records a call. Its
callback receives the complete source with signature and template instantiation, the launch
geometry, and which of `shape`, `strides` and `ndim` each input passes along. Apple's compiler
gets the same text on a Mac, after MLX's `utils.h`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx

from .run import Triple

# Bound at import, before `emulate` replaces it: a capture needs MLX's own function.
mlx_metal_kernel: Callable[..., Any] = mx.fast.metal_kernel


@dataclass(frozen=True)
class KernelDefinition:
    """The arguments of a `mx.fast.metal_kernel` call."""

    name: str
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    source: str
    header: str = ""
    ensure_row_contiguous: bool = True
    atomic_outputs: bool = False

    def build(self) -> Callable[..., Any]:
        """Return MLX's own kernel object for this definition."""
        kernel: Callable[..., Any] = mlx_metal_kernel(
            name=self.name,
            input_names=list(self.input_names),
            output_names=list(self.output_names),
            source=self.source,
            header=self.header,
            ensure_row_contiguous=self.ensure_row_contiguous,
            atomic_outputs=self.atomic_outputs,
        )
        return kernel


class ShapeInfo(NamedTuple):
    """The metadata buffers that follow an input in the signature."""

    shape: bool
    strides: bool
    ndim: bool


@dataclass(frozen=True)
class Capture:
    """A recorded kernel call.

    Attributes:
        function: name of the generated kernel function.
        source: the generated source, header first.
        instance: expression of the instantiated function, `f<bfloat16_t, 64>`.
        grid: threads per dimension, as MLX dispatches them.
        threadgroup: threads of a threadgroup per dimension.
        shape_infos: the metadata of each input.
    """

    function: str
    source: str
    instance: str
    grid: Triple
    threadgroup: Triple
    shape_infos: tuple[ShapeInfo, ...]


def capture_calls(function: Callable[..., Any], *arrays: mx.array) -> list[Capture]:
    """Return all custom kernel calls of `function(*arrays)`, in the order of its graph.

    Args:
        function: a function of arrays that calls objects of `mx.fast.metal_kernel`.
        arrays: example arguments; only shapes and dtypes matter, they are not evaluated.
    """
    records: list[list[Any]] = []

    def callback(event: dict[str, Any]) -> None:
        if event.get("name") == "CustomKernel":
            records.append(event["arguments"])

    mx.export_function(callback, function, *arrays)
    return [_from_arguments(arguments) for arguments in records]


def capture_call(kernel: Callable[..., Any], inputs: Sequence[mx.array], **launch: Any) -> Capture:
    """Return the source and geometry of one call of `kernel`.

    Args:
        kernel: MLX's own kernel object, from `KernelDefinition.build`.
        inputs: example inputs; only shapes and dtypes matter, they are not evaluated.
        launch: the other arguments of the call (`grid`, `template`, `output_shapes`, ...).
    """
    examples = [mx.zeros(x.shape, dtype=x.dtype) for x in inputs]
    if not examples:  # export needs an input; an unused one does not reach the kernel
        return capture_calls(lambda _: kernel(inputs=[], **launch), mx.zeros(()))[0]
    return capture_calls(lambda *xs: kernel(inputs=list(xs), **launch), *examples)[0]


def _from_arguments(arguments: list[Any]) -> Capture:
    function, source = arguments[0], arguments[1]
    match = re.search(r"decltype\(" + re.escape(function) + r"(<.*>)\)", source)
    return Capture(
        function=function,
        source=source,
        instance=function + (match.group(1) if match else ""),
        grid=tuple(arguments[2:5]),
        threadgroup=tuple(arguments[5:8]),
        shape_infos=tuple(ShapeInfo(*info) for info in arguments[8]),
    )
