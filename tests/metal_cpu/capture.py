"""Ask MLX itself for the Metal source it generates.

`mx.fast.metal_kernel` needs a Mac to run, but inside `mx.export_function` a call is only recorded:
the export callback receives the complete source (signature, template instantiation and all), the
launch geometry and which of `shape`, `strides` and `ndim` each input passes along. This is the very
text that Apple's compiler gets on a Mac, behind MLX's `utils.h`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx

# Kept from before anything replaces it: captures must always reach MLX's own function.
mlx_metal_kernel: Callable[..., Any] = mx.fast.metal_kernel

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class KernelDefinition:
    """The arguments of one `mx.fast.metal_kernel` call."""

    name: str
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    source: str
    header: str = ""
    ensure_row_contiguous: bool = True
    atomic_outputs: bool = False

    def build(self) -> Callable[..., Any]:
        """MLX's own kernel object for this definition."""
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
    """Which metadata buffers follow an input in the signature."""

    shape: bool
    strides: bool
    ndim: bool


@dataclass(frozen=True)
class Capture:
    """One recorded kernel call.

    Attributes:
        function: the name MLX gave the kernel function.
        source: the generated text, header first.
        instance: the expression that names the instantiated function, `f<bfloat16_t, 64>`.
        grid: threads, not threadgroups, as MLX dispatches them.
        threadgroup: threads in a threadgroup.
        shape_infos: one for each input.
    """

    function: str
    source: str
    instance: str
    grid: Triple
    threadgroup: Triple
    shape_infos: tuple[ShapeInfo, ...]


def capture_calls(function: Callable[..., Any], *arrays: mx.array) -> list[Capture]:
    """Every custom kernel that `function(*arrays)` launches, in the order of its graph.

    Args:
        function: any function of arrays that calls `mx.fast.metal_kernel` objects.
        arrays: examples; only their shapes and types matter, they are not evaluated.

    Returns:
        One `Capture` for each kernel call.
    """
    records: list[list[Any]] = []

    def callback(event: dict[str, Any]) -> None:
        if event.get("name") == "CustomKernel":
            records.append(event["arguments"])

    mx.export_function(callback, function, *arrays)
    return [_from_arguments(arguments) for arguments in records]


def capture_call(kernel: Callable[..., Any], inputs: Sequence[mx.array], **launch: Any) -> Capture:
    """The source and geometry of one call of `kernel`, which must be MLX's own kernel object.

    Args:
        kernel: what `KernelDefinition.build` returned.
        inputs: examples; only their shapes and types matter, they are not evaluated.
        launch: the other arguments of the call (`grid`, `template`, `output_shapes`, ...).
    """
    examples = [mx.zeros(x.shape, dtype=x.dtype) for x in inputs]
    if not examples:  # export needs at least one input; an unused one does not reach the kernel
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
