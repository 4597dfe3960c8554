"""Run a compiled kernel over a grid, and map the findings of the runtime to source lines."""

from __future__ import annotations

import ctypes
import functools
import re
import subprocess
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .build import Library, build
from .errors import Finding, KernelError, finding
from .toolchain import KERNEL_FILE

Triple = tuple[int, int, int]

ORDERS = ("forward", "reverse", "random")
ROLES = {"input": 0, "output": 1, "initialised output": 2}
MAX_THREADS = 1024
_FUNCTION_CONSTANTS = 512
_lock = threading.Lock()  # the runtime runs one launch at a time per process


@dataclass(frozen=True)
class Buffer:
    """A buffer argument of a kernel.

    Attributes:
        array: a contiguous array; outputs are written in place.
        role: `input`: read only. `output`: its content is undefined before the launch, and every
            element must be written. `initialised output`: read and written.
        origin: byte of the array that the kernel's pointer points to.
    """

    array: np.ndarray[Any, Any]
    role: str = "input"
    origin: int = 0


@dataclass(frozen=True)
class Traffic:
    """Accesses of a kernel to one buffer, counted per element (checked mode).

    Loads that the compiler optimised away are not counted.

    Attributes:
        role: role of the buffer.
        elements, itemsize: size of the buffer.
        loads, stores: accesses to elements; a vector access counts once per element.
        elements_loaded, elements_stored: number of distinct elements accessed.
        most_loads, most_stores: accesses to the element that was accessed most often.
    """

    role: str
    elements: int
    itemsize: int
    loads: int
    stores: int
    elements_loaded: int
    elements_stored: int
    most_loads: int
    most_stores: int

    @property
    def bytes_read(self) -> int:
        return self.loads * self.itemsize

    @property
    def bytes_written(self) -> int:
        return self.stores * self.itemsize


@dataclass(frozen=True)
class Counters:
    """Operations of a launch, summed over all threads.

    Attributes:
        exchanges: simdgroup operations, per lane.
        barriers: barriers, per thread.
        accesses: loads and stores outside private memory (checked mode).
        threadgroup_bytes: threadgroup memory of one threadgroup.
    """

    exchanges: int
    barriers: int
    accesses: int
    threadgroup_bytes: int


@dataclass(frozen=True)
class Result:
    """Result of a launch.

    Attributes:
        counters: operations of all threads.
        traffic: accesses per buffer, by parameter name (checked mode).
        accepted: findings that the caller allowed.
    """

    counters: Counters
    traffic: dict[str, Traffic]
    accepted: tuple[Finding, ...]


@dataclass(frozen=True)
class RunOptions:
    """Options of a run.

    Attributes:
        checked: detect races, out-of-bounds and uninitialised accesses, and count the traffic.
        order: order of the threads: `forward`, `reverse` or `random`.
        seed: seed of the random order.
        strict: report a simdgroup operation that not all lanes reach.
        flush_denormals: flush denormal float results to zero, as a GPU may.
        allow: accept findings whose message contains one of these texts.
        time_limit_s: processor time after which a launch counts as an endless loop.
    """

    checked: bool = False
    order: str = "forward"
    seed: int = 0
    strict: bool = True
    flush_denormals: bool = False
    allow: tuple[str, ...] = ()
    time_limit_s: int = 120

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            expected = ", ".join(ORDERS)
            raise ValueError(f"order: found '{self.order}', expected one of {expected}")


class _Buffer(ctypes.Structure):
    _fields_ = [
        ("host", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("origin", ctypes.c_uint64),
        ("role", ctypes.c_uint32),
        ("granule", ctypes.c_uint32),
        ("name", ctypes.c_char_p),
    ]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("entry", ctypes.c_void_p),
        ("set_constants", ctypes.c_void_p),
        ("function_constants", ctypes.POINTER(ctypes.c_uint64)),
        ("buffers", ctypes.POINTER(_Buffer)),
        ("buffer_count", ctypes.c_uint32),
        ("grid", ctypes.c_uint32 * 3),
        ("threadgroup", ctypes.c_uint32 * 3),
        ("order", ctypes.c_uint32),
        ("seed", ctypes.c_uint32),
        ("checked", ctypes.c_uint32),
        ("strict", ctypes.c_uint32),
        ("flush_denormals", ctypes.c_uint32),
        ("seconds", ctypes.c_uint32),
    ]


class _Traffic(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            "loads",
            "stores",
            "elements_loaded",
            "elements_stored",
            "most_loads",
            "most_stores",
        )
    ]


class _Counters(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_uint64)
        for name in ("exchanges", "barriers", "accesses", "threadgroup_bytes")
    ]


def run_source(
    source: str,
    function: str,
    buffers: Sequence[Buffer | np.ndarray[Any, Any]],
    grid: Triple,
    threadgroup: Triple,
    options: RunOptions | None = None,
    *,
    instance: str = "",
    function_constants: Mapping[int, int | float] | None = None,
) -> Result:
    """Compile and run a kernel of a Metal source file. MLX is not needed.

    Args:
        source: the Metal source.
        function: name of the kernel function.
        buffers: the buffer arguments, in order; a plain array is an input.
        grid: threads per dimension.
        threadgroup: threads of a threadgroup per dimension.
        options: order of the threads, checks, limits.
        instance: expression of the instantiated function, if it is a template.
        function_constants: values by index.

    Raises:
        KernelError: the source does not compile, or breaks a rule.
    """
    options = options or RunOptions()
    library = build(source, function, instance, options.checked)
    arguments = [
        entry if isinstance(entry, Buffer) else Buffer(np.ascontiguousarray(entry))
        for entry in buffers
    ]
    constants = function_constants
    return run(
        library, arguments, grid, threadgroup, options, function_constants=constants, name=function
    )


def run(
    library: Library,
    buffers: Sequence[Buffer],
    grid: Triple,
    threadgroup: Triple,
    options: RunOptions,
    *,
    function_constants: Mapping[int, int | float] | None = None,
    name: str = "kernel",
) -> Result:
    """Run a grid of threads.

    Args:
        library: from `build`, with the same `checked`.
        buffers: the buffer arguments, in the order of the signature.
        grid: threads per dimension; the last threadgroups may be smaller.
        threadgroup: threads of a threadgroup per dimension.
        options: order of the threads, checks, limits.
        function_constants: values by index.
        name: name of the kernel, for messages.

    Raises:
        KernelError: with all findings.
    """
    slots = [p for p in library.parameters if p.is_buffer]
    if len(slots) != len(buffers):
        message = f"found {len(buffers)} buffers, expected {len(slots)} as in the signature"
        raise KernelError(name, [Finding(message)])
    group = _threadgroup(name, grid, threadgroup)
    described = (_Buffer * len(buffers))()
    for parameter, buffer in zip(slots, buffers, strict=True):
        described[parameter.slot] = _describe(parameter.name, buffer)
    launch = _Launch(
        buffers=described,
        buffer_count=len(buffers),
        grid=(ctypes.c_uint32 * 3)(*grid),
        threadgroup=(ctypes.c_uint32 * 3)(*group),
        order=ORDERS.index(options.order),
        seed=options.seed,
        checked=options.checked,
        strict=options.strict,
        flush_denormals=options.flush_denormals,
        seconds=options.time_limit_s,
    )
    kernel = _load(library.path)
    launch.entry = ctypes.cast(kernel.mtl_entry, ctypes.c_void_p)
    launch.set_constants = ctypes.cast(kernel.mtl_set_constants, ctypes.c_void_p)
    if function_constants is not None:
        launch.function_constants = _constant_bits(function_constants)
    traffic = (_Traffic * len(buffers))()
    counters = _Counters()
    runtime = _load(library.runtime)
    runtime.mtl_findings.restype = ctypes.c_char_p
    with _lock:
        runtime.mtl_run(ctypes.byref(launch), traffic, ctypes.byref(counters))
        log = runtime.mtl_findings().decode()
    findings = _findings(log, library)
    accepted = [f for f in findings if any(text in f.message for text in options.allow)]
    refused = [f for f in findings if f not in accepted]
    if refused:
        raise KernelError(name, refused)
    counted = {}
    if options.checked:
        for parameter, buffer in zip(slots, buffers, strict=True):
            array, numbers = buffer.array, _fields(traffic[parameter.slot])
            counted[parameter.name] = Traffic(buffer.role, array.size, array.itemsize, **numbers)
    return Result(Counters(**_fields(counters)), counted, tuple(accepted))


def _describe(name: str, buffer: Buffer) -> _Buffer:
    array = buffer.array
    return _Buffer(
        array.ctypes.data,
        array.nbytes,
        buffer.origin,
        ROLES[buffer.role],
        max(array.itemsize, 1),
        name.encode(),
    )


def _fields(numbers: ctypes.Structure) -> dict[str, int]:
    return {field: getattr(numbers, field) for field, *_ in numbers._fields_}


def _threadgroup(name: str, grid: Triple, threadgroup: Triple) -> Triple:
    """Return the threadgroup as MLX dispatches it: at most as large as the grid."""
    x, y, z = (max(min(g, t), 1) for g, t in zip(grid, threadgroup, strict=True))
    if x * y * z > MAX_THREADS:
        message = f"threadgroup of {x * y * z} threads, expected at most {MAX_THREADS}"
        raise KernelError(name, [Finding(message)])
    if min(grid) < 0:
        raise KernelError(name, [Finding(f"grid: found {grid}, expected no negative dimension")])
    return x, y, z


@functools.cache
def _load(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))


def _constant_bits(values: Mapping[int, int | float]) -> Any:
    bits = (ctypes.c_uint64 * _FUNCTION_CONSTANTS)()
    for index, value in values.items():
        if isinstance(value, float):
            bits[index] = int(np.float32(value).view(np.uint32))
        else:
            bits[index] = int(value)
    return bits


def _findings(log: str, library: Library) -> list[Finding]:
    found: list[Finding] = []
    for row in log.splitlines():
        kind, place, line, message = row.split("\t")
        if kind == "paths":
            one, other = ([_place(o, library.path) for o in p.split(",")] for p in place.split("|"))
            if one == other:
                continue  # one call in the source that the compiler duplicated
        elif place != "0":
            line = str(_place(place, library.path)[0])
        entry = finding(message, int(line), library.source)
        if entry not in found:
            found.append(entry)
    return found


@functools.cache
def _place(offset: str, path: Path) -> tuple[int, str]:
    """Return the source line of an offset in the library (0: none), and the branch of that line."""
    if not offset:
        return 0, ""
    # A return address: one less lies within the call.
    address = hex(int(offset, 16) - 1)
    command = ["addr2line", "-i", "-e", str(path), address]
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return 0, ""  # no binutils: findings have no lines
    match = re.search(rf"{re.escape(KERNEL_FILE)}:(\d+)(.*)", result.stdout)
    return (int(match.group(1)), match.group(2)) if match else (0, "")
