"""A kernel object with the interface of MLX's own that runs on the CPU."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from .arrays import empty_output, memory_of, to_mlx, to_numpy
from .build import build
from .capture import Capture, KernelDefinition, capture_call
from .errors import Finding, KernelError
from .run import Buffer, Counters, RunOptions, Traffic, Triple, run


@dataclass(frozen=True)
class ArrayInfo:
    """Name, shape and dtype of an input or output."""

    name: str
    shape: tuple[int, ...]
    dtype: mx.Dtype


@dataclass(frozen=True)
class Launch:
    """A kernel call that was run.

    Attributes:
        definition: the arguments of `mx.fast.metal_kernel`.
        capture: the source and geometry that MLX made of them.
        template: the template arguments of the call.
        inputs, outputs: the arrays, without their values.
        init_value: the initial value of the outputs, or None.
        options: the options of the run.
        counters: exchanges, barriers, accesses and threadgroup bytes.
        traffic: loads and stores per buffer, by parameter name (checked mode).
        accepted: findings that the caller allowed.
        seconds: duration of the run.
        buffers: the buffers by parameter name, outputs with their final values and bfloat16 as
            uint16; empty without `keep_values`.
    """

    definition: KernelDefinition
    capture: Capture
    template: tuple[tuple[str, Any], ...]
    inputs: tuple[ArrayInfo, ...]
    outputs: tuple[ArrayInfo, ...]
    init_value: Any
    options: RunOptions
    counters: Counters
    traffic: dict[str, Traffic]
    accepted: tuple[Finding, ...]
    seconds: float
    buffers: dict[str, Buffer] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        return self.definition.name

    @property
    def source(self) -> str:
        """The generated source, as passed to Apple's compiler on a Mac."""
        return self.capture.source

    @property
    def grid(self) -> Triple:
        return self.capture.grid

    @property
    def threadgroup(self) -> Triple:
        return self.capture.threadgroup

    @property
    def mode(self) -> str:
        return "checked" if self.options.checked else "fast"

    @property
    def order(self) -> str:
        return self.options.order


@dataclass(frozen=True)
class Settings:
    """Options of a context of `emulate`."""

    options: RunOptions
    record: list[Launch] | None
    keep_values: bool


# The entered contexts, innermost last.
active: list[Settings] = []


@dataclass(frozen=True)
class _Call:
    """The arguments of a call, except the inputs."""

    output_shapes: tuple[tuple[int, ...], ...]
    output_dtypes: tuple[mx.Dtype, ...]
    grid: Triple
    threadgroup: Triple
    template: tuple[tuple[str, Any], ...]
    init_value: Any


class EmulatedKernel:
    """The kernel that `mx.fast.metal_kernel` returns within `emulate`.

    A call evaluates the inputs and uses the options of the innermost context.
    """

    def __init__(self, definition: KernelDefinition) -> None:
        self.definition = definition
        self._metal = definition.build()
        self._captures: dict[Any, Capture] = {}

    def __call__(
        self,
        *,
        inputs: Sequence[Any],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: Sequence[int],
        threadgroup: Sequence[int],
        template: Sequence[tuple[str, Any]] | None = None,
        init_value: Any = None,
        verbose: bool = False,
        stream: Any = None,
    ) -> list[mx.array]:
        """Run the kernel; the arguments are those of MLX's kernels, `stream` is ignored."""
        if not active:
            raise self._error("built within emulate() but called outside of it")
        arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
        call = _Call(
            tuple(tuple(shape) for shape in output_shapes),
            tuple(output_dtypes),
            tuple(grid),  # type: ignore[arg-type]
            tuple(threadgroup),  # type: ignore[arg-type]
            tuple(template or ()),
            init_value,
        )
        captured = self._capture(arrays, call)
        if verbose:
            print(captured.source)
        if not arrays:
            return self._execute(captured, (), call)

        @mx.custom_function
        def execute(*values: mx.array) -> list[mx.array]:
            return self._execute(captured, values, call)

        @execute.vjp
        def no_gradient(*_: Any) -> None:
            # MLX's kernels refuse as well. Without this the gradient would silently be zero.
            raise self._error("has no gradient: wrap it in mx.custom_function and give that a vjp")

        outputs: list[mx.array] = execute(*arrays)  # type: ignore[assignment]
        return outputs

    def _error(self, message: str) -> KernelError:
        return KernelError(self.definition.name, [Finding(message)])

    def _capture(self, arrays: Sequence[mx.array], call: _Call) -> Capture:
        key = (tuple((tuple(x.shape), x.dtype) for x in arrays), repr(call))
        if key not in self._captures:
            self._captures[key] = capture_call(
                self._metal,
                arrays,
                output_shapes=list(call.output_shapes),
                output_dtypes=list(call.output_dtypes),
                grid=call.grid,
                threadgroup=call.threadgroup,
                template=list(call.template),
                init_value=call.init_value,
            )
        return self._captures[key]

    def _execute(
        self, captured: Capture, arrays: Sequence[mx.array], call: _Call
    ) -> list[mx.array]:
        try:
            mx.eval(*arrays)
        except ValueError as error:
            message = f"cannot run inside this function transformation: {error}"
            raise self._error(message) from error
        settings = active[-1]
        options = settings.options
        library = build(captured.source, captured.function, captured.instance, options.checked)
        outputs = [
            empty_output(shape, dtype, call.init_value)
            for shape, dtype in zip(call.output_shapes, call.output_dtypes, strict=True)
        ]
        role = "output" if call.init_value is None else "initialised output"
        buffers = self._input_buffers(captured, arrays)
        buffers += [Buffer(output, role) for output in outputs]
        start = time.perf_counter()
        result = run(
            library,
            buffers,
            captured.grid,
            captured.threadgroup,
            options,
            name=self.definition.name,
        )
        seconds = time.perf_counter() - start
        if settings.record is not None:
            names = [p.name for p in library.parameters if p.is_buffer]
            kept = dict(zip(names, buffers, strict=True)) if settings.keep_values else {}
            settings.record.append(
                Launch(
                    self.definition,
                    captured,
                    call.template,
                    _infos(self.definition.input_names, arrays),
                    _output_infos(self.definition.output_names, call),
                    call.init_value,
                    options,
                    result.counters,
                    result.traffic,
                    result.accepted,
                    seconds,
                    kept,
                )
            )
        return [
            to_mlx(output, shape, dtype)
            for output, shape, dtype in zip(
                outputs, call.output_shapes, call.output_dtypes, strict=True
            )
        ]

    def _input_buffers(self, captured: Capture, arrays: Sequence[mx.array]) -> list[Buffer]:
        """Return the inputs in MLX's binding order, each followed by its metadata."""
        buffers = []
        for array, info in zip(arrays, captured.shape_infos, strict=True):
            if self.definition.ensure_row_contiguous:
                data = to_numpy(array)
                buffers.append(Buffer(data))
                strides = tuple(s // data.itemsize for s in data.strides)
            else:
                memory = memory_of(array)
                buffers.append(Buffer(memory.data, origin=memory.origin))
                strides = memory.strides
            if array.ndim == 0:
                continue  # a reference to one value has no metadata
            if info.shape:
                buffers.append(Buffer(np.array(array.shape, np.int32)))
            if info.strides:
                buffers.append(Buffer(np.array(strides, np.int64)))
            if info.ndim:
                buffers.append(Buffer(np.array([array.ndim], np.int32)))
        return buffers


def _infos(names: Sequence[str], arrays: Sequence[mx.array]) -> tuple[ArrayInfo, ...]:
    return tuple(
        ArrayInfo(name, tuple(array.shape), array.dtype)
        for name, array in zip(names, arrays, strict=True)
    )


def _output_infos(names: Sequence[str], call: _Call) -> tuple[ArrayInfo, ...]:
    return tuple(
        ArrayInfo(name, shape, dtype)
        for name, shape, dtype in zip(names, call.output_shapes, call.output_dtypes, strict=True)
    )
