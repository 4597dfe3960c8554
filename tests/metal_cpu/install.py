"""Make `mx.fast.metal_kernel` return kernels that run on the CPU."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from .arrays import empty_output, memory_of, to_mlx, to_numpy
from .build import build
from .capture import Capture, KernelDefinition, Triple, capture_call
from .errors import Finding, KernelError
from .run import ORDERS, Buffer, Counters, Traffic, run

MODES = ("fast", "checked")


@dataclass(frozen=True)
class ArrayInfo:
    """Name, shape and type of an input or output."""

    name: str
    shape: tuple[int, ...]
    dtype: mx.Dtype


@dataclass(frozen=True)
class Launch:
    """One kernel call that was executed.

    Attributes:
        definition: what `mx.fast.metal_kernel` was given.
        capture: what MLX made of it; `capture.source` is the generated text.
        template: the call's template arguments.
        inputs, outputs: the arrays, without their values.
        input_values, output_values: NumPy arrays (bfloat16 as uint16), if `keep_values` was asked for.
        counters: exchanges, barriers, accesses and threadgroup bytes.
        traffic: for each buffer by name, loads and stores as counted (checked mode only).
        seconds: that the grid took.
    """

    definition: KernelDefinition
    capture: Capture
    template: tuple[tuple[str, Any], ...]
    inputs: tuple[ArrayInfo, ...]
    outputs: tuple[ArrayInfo, ...]
    init_value: Any
    mode: str
    order: str
    counters: Counters
    traffic: dict[str, Traffic]
    accepted: tuple[Finding, ...]
    seconds: float
    input_values: tuple[np.ndarray[Any, Any], ...] = field(default=(), repr=False)
    output_values: tuple[np.ndarray[Any, Any], ...] = field(default=(), repr=False)

    @property
    def name(self) -> str:
        return self.definition.name

    @property
    def source(self) -> str:
        return self.capture.source

    @property
    def grid(self) -> Triple:
        return self.capture.grid

    @property
    def threadgroup(self) -> Triple:
        return self.capture.threadgroup


@dataclass(frozen=True)
class _Settings:
    mode: str
    order: str
    seed: int
    strict: bool
    flush_denormals: bool
    allow: tuple[str, ...]
    record: list[Launch] | None
    keep_values: bool


_active: list[_Settings] = []


@contextlib.contextmanager
def executed(
    mode: str = "fast",
    order: str = "forward",
    record: list[Launch] | None = None,
    *,
    seed: int = 0,
    strict: bool = True,
    flush_denormals: bool = False,
    allow: Sequence[str] = (),
    keep_values: bool = False,
    as_default_device: bool = False,
) -> Iterator[None]:
    """Within this context custom Metal kernels are executed on the CPU.

    `mx.fast.metal_kernel` builds stand-ins, `mx.metal.is_available` says True, and `mx.compile` is off,
    because a stand-in evaluates its inputs. A stand-in looks up the innermost context when it is called:
    it may be kept and called again in another one, but not outside.

    Args:
        mode: `fast`, or `checked`: every access is watched for races, bounds and unwritten memory.
        order: in which threads run: `forward`, `reverse` or `random`. Results must not depend on it.
        record: a list to which each call appends a `Launch`.
        seed: of the random order.
        strict: a simdgroup operation that not all lanes reach is an error.
        flush_denormals: float results too small for a normal number become zero, as a GPU may do.
        allow: findings whose message contains one of these texts are accepted.
        keep_values: launches keep the values of their inputs and outputs.
        as_default_device: `mx.default_device()` reports a GPU, for code that asks.

    Raises:
        KernelError: from the call of a kernel that breaks a rule.
    """
    if mode not in MODES:
        raise ValueError(f"mode: found '{mode}', expected one of {', '.join(MODES)}")
    if order not in ORDERS:
        raise ValueError(f"order: found '{order}', expected one of {', '.join(ORDERS)}")
    settings = _Settings(
        mode, order, seed, strict, flush_denormals, tuple(allow), record, keep_values
    )
    with contextlib.ExitStack() as undo:
        _active.append(settings)
        undo.callback(_active.pop)
        _replace(undo, mx.fast, "metal_kernel", metal_kernel)
        _replace(undo, mx.metal, "is_available", lambda: True)
        if as_default_device:
            gpu = mx.Device(mx.gpu, 0)
            _replace(undo, mx, "default_device", lambda: gpu)
        if _compile_is_on():
            mx.disable_compile()
            undo.callback(mx.enable_compile)
        yield


def metal_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    atomic_outputs: bool = False,
) -> StandIn:
    """What `mx.fast.metal_kernel` is within `executed`: the same arguments, a stand-in."""
    return StandIn(
        KernelDefinition(
            name,
            tuple(input_names),
            tuple(output_names),
            source,
            header,
            ensure_row_contiguous,
            atomic_outputs,
        )
    )


class StandIn:
    """A kernel object that runs on the CPU when called."""

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
        grid: Triple,
        threadgroup: Triple,
        template: Sequence[tuple[str, Any]] | None = None,
        init_value: Any = None,
        verbose: bool = False,
        stream: Any = None,
    ) -> list[mx.array]:
        """The call that MLX documents for its kernels."""
        if not _active:
            message = "kernel built under executed() but called outside of it"
            raise KernelError(self.definition.name, [Finding(message)])
        arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
        launch = {
            "output_shapes": [tuple(shape) for shape in output_shapes],
            "output_dtypes": list(output_dtypes),
            "grid": tuple(grid),
            "threadgroup": tuple(threadgroup),
            "template": list(template or []),
            "init_value": init_value,
        }
        captured = self._capture(arrays, launch)
        if verbose:
            print(captured.source)

        @mx.custom_function
        def execute(*values: mx.array) -> list[mx.array]:
            return self._execute(captured, values, launch, _active[-1])

        @execute.vjp
        def no_gradient(*_: Any) -> None:
            # On a Mac MLX refuses as well. Outputs made of plain values would give a gradient of 0.
            message = "has no gradient; wrap it in mx.custom_function and give it a vjp"
            raise KernelError(self.definition.name, [Finding(message)])

        return execute(*arrays) if arrays else self._execute(captured, (), launch, _active[-1])

    def _capture(self, arrays: Sequence[mx.array], launch: dict[str, Any]) -> Capture:
        shapes = tuple((tuple(x.shape), x.dtype) for x in arrays)
        key = (shapes, repr(launch))
        if key not in self._captures:
            self._captures[key] = capture_call(self._metal, arrays, **launch)
        return self._captures[key]

    def _execute(
        self,
        captured: Capture,
        arrays: Sequence[mx.array],
        launch: dict[str, Any],
        settings: _Settings,
    ) -> list[mx.array]:
        try:
            mx.eval(*arrays)
        except ValueError as error:
            message = f"cannot run inside this function transformation: {error}"
            raise KernelError(self.definition.name, [Finding(message)]) from error
        checked = settings.mode == "checked"
        library = build(captured.source, captured.function, captured.instance, checked)
        buffers = self._input_buffers(captured, arrays)
        outputs = []
        for shape, dtype in zip(launch["output_shapes"], launch["output_dtypes"]):
            output = empty_output(shape, dtype, launch["init_value"])
            role = "output" if launch["init_value"] is None else "initialised output"
            buffers.append(Buffer(output, role))
            outputs.append(output)
        start = time.perf_counter()
        result = run(
            library,
            buffers,
            captured.grid,
            captured.threadgroup,
            checked=checked,
            order=settings.order,
            seed=settings.seed,
            strict=settings.strict,
            flush_denormals=settings.flush_denormals,
            allow=settings.allow,
            name=self.definition.name,
        )
        seconds = time.perf_counter() - start
        if settings.record is not None:
            keep = settings.keep_values
            settings.record.append(
                Launch(
                    definition=self.definition,
                    capture=captured,
                    template=tuple(launch["template"]),
                    inputs=_infos(self.definition.input_names, arrays),
                    outputs=tuple(
                        ArrayInfo(name, shape, dtype)
                        for name, shape, dtype in zip(
                            self.definition.output_names,
                            launch["output_shapes"],
                            launch["output_dtypes"],
                        )
                    ),
                    init_value=launch["init_value"],
                    mode=settings.mode,
                    order=settings.order,
                    counters=result.counters,
                    traffic=result.traffic,
                    accepted=result.accepted,
                    seconds=seconds,
                    input_values=tuple(to_numpy(x) for x in arrays) if keep else (),
                    output_values=tuple(outputs) if keep else (),
                )
            )
        return [
            to_mlx(output, shape, dtype)
            for output, shape, dtype in zip(
                outputs, launch["output_shapes"], launch["output_dtypes"]
            )
        ]

    def _input_buffers(self, captured: Capture, arrays: Sequence[mx.array]) -> list[Buffer]:
        """The buffers in the order MLX binds them: each input, then the metadata that it passes."""
        buffers = []
        for array, info in zip(arrays, captured.shape_infos):
            if self.definition.ensure_row_contiguous:
                data = to_numpy(array)
                buffers.append(Buffer(data))
                strides = tuple(s // data.itemsize for s in data.strides)
            else:
                memory = memory_of(array)
                buffers.append(Buffer(memory.data, origin=memory.origin))
                strides = memory.strides
            if array.ndim == 0:
                continue
            if info.shape:
                buffers.append(Buffer(np.array(array.shape, np.int32)))
            if info.strides:
                buffers.append(Buffer(np.array(strides, np.int64)))
            if info.ndim:
                buffers.append(Buffer(np.array([array.ndim], np.int32)))
        return buffers


def _infos(names: Sequence[str], arrays: Sequence[mx.array]) -> tuple[ArrayInfo, ...]:
    return tuple(ArrayInfo(n, tuple(x.shape), x.dtype) for n, x in zip(names, arrays))


def _replace(undo: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    undo.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _compile_is_on() -> bool:
    """Whether `mx.compile` compiles: MLX has a switch for it, but no way to read the switch."""
    calls = []
    probe = mx.compile(lambda x: (calls.append(1), x + 1)[1])
    zero = mx.zeros(())
    mx.eval(probe(zero), probe(zero))
    return len(calls) == 1
