"""Custom Metal kernels: their sources, how they are built, launched and validated.

A kernel is a file ``metal/<name>.metal``: the body of one Metal function, behind the helpers of
``metal/common.metal``. The operation that owns it declares it once, on import:

    KERNEL = MetalKernel(
        "rg_lru",                           # metal/rg_lru.metal
        inputs=("x", "a", ...),             # buffer names, in the order of `run`'s inputs
        outputs=("y", "h_last"),
        launch=_launch,                     # (*arguments) -> results, through `KERNEL.run(...)`
        reference=_reference,               # (*arguments) -> the same results, in plain MLX
        sample_inputs=_sample_inputs,       # (*variant) -> arguments: small, of that variant
    )

A kernel is compiled once per variant: its dtypes and head size. The first time that a variant is
asked for, `KERNEL.validated(*variant)` runs launch and reference on the same sample, outside of any
trace. A variant that does not compile or does not agree is off from then on, with one warning.

A sample draws its arrays with `sample`, keeps at least 8 elements in each array that has them in
real use (MLX passes smaller ones in another address space, which is another compilation), and is
long enough to launch the largest threadgroup.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_rgemma.ops import backend
from mlx_rgemma.ops.backend import Backend

FLOATS = (mx.float32, mx.bfloat16, mx.float16)
"""The dtypes that kernels read and write; all of them compute in float32."""

BY_DTYPE = tuple((dtype,) for dtype in FLOATS)
"""The variants of a kernel that is compiled once per dtype."""

SIMD = 32
"""Threads in a simdgroup; a threadgroup has a multiple of it."""

TOLERANCE = {mx.float32: 1e-4, mx.bfloat16: 2.0**-7, mx.float16: 2.0**-10}
"""Largest difference in a validation, relative to the largest value: the half precisions may round
to either side. Loose on purpose: it must find a kernel that computes something else."""

Arrays = Sequence[mx.array]
Triple = tuple[int, int, int]


class Status(NamedTuple):
    """The state of a kernel's variant: ``untried``, ``passed`` or ``off``."""

    name: str
    file: str
    variant: tuple[Any, ...]
    state: str
    error: str


class Comparison(NamedTuple):
    """A kernel beside its reference.

    Attributes:
        errors: Largest difference of each output, relative to the largest value of the reference.
        allowed: The bound of each.
        error: Why the two do not agree, in a few words; empty when they do.
    """

    errors: tuple[float, ...]
    allowed: tuple[float, ...]
    error: str


@dataclass(eq=False)
class MetalKernel:
    """A kernel with its reference; declaring one registers it.

    Nothing is read or built before it is needed.

    Args:
        name: Of the file ``metal/<name>.metal``.
        inputs, outputs: Names of the buffers, as the source has them.
        launch: ``(*arguments) -> results``, through `run`.
        reference: The same in plain MLX operations.
        sample_inputs: ``(*variant) -> arguments``, small.
        benchmark_inputs: As `sample_inputs`, but as large as in the 2B model at 2048 tokens.
        results: Names of what `launch` returns, where that is not `outputs`.
        variants: The variants that the self-test command goes through.
        headers: Files that come before the function, in this order.
        tolerance: Bound of a validation by output dtype; see `TOLERANCE`.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    launch: Callable[..., Arrays]
    reference: Callable[..., Arrays]
    sample_inputs: Callable[..., Sequence[Any]]
    benchmark_inputs: Callable[..., Sequence[Any]] | None = None
    results: tuple[str, ...] | None = None
    variants: Sequence[tuple[Any, ...]] = BY_DTYPE
    headers: tuple[str, ...] = ("common.metal",)
    tolerance: Mapping[mx.Dtype, float] = field(default_factory=lambda: TOLERANCE)
    validation: dict[tuple[Any, ...], str] = field(default_factory=dict, repr=False)
    built: Callable[..., Any] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        _kernels[self.name] = self

    @property
    def file(self) -> str:
        return f"{self.name}.metal"

    def validated(self, *variant: Any) -> bool:
        """Return whether to launch this variant; validate it on first use."""
        if any(isinstance(part, mx.Dtype) and part not in FLOATS for part in variant):
            return False
        error = self.validation.get(variant)
        if error is None and not _local.trusted:
            error = self._validate(variant)
        return not error

    def _validate(self, variant: tuple[Any, ...]) -> str:
        try:
            error = self.compare(*variant).error
        except Exception as failure:  # whatever a compiler or driver comes up with
            error = f"{type(failure).__name__}: {_first_line(failure)}"
        self.validation[variant] = error
        if error:
            warnings.warn(
                f"Metal kernel {self.file} ({format_variant(variant)}) is switched off: {error}."
                " Plain MLX operations are used instead, which are slower."
                " `python -m mlx_rgemma.selftest` shows more.",
                RuntimeWarning,
                stacklevel=5,
            )
        return error

    def run(
        self,
        inputs: Arrays,
        outputs: Sequence[tuple[Sequence[int], mx.Dtype]],
        *,
        groups: Triple,
        threadgroup: Triple,
        template: Mapping[str, Any] | None = None,
    ) -> list[mx.array]:
        """Launch the kernel.

        Args:
            inputs: In the order of the registered names; copied first if not row-contiguous.
            outputs: Shape and dtype of each output; uninitialised until the kernel writes it.
            groups: Threadgroups in each dimension; all of them are whole.
            threadgroup: Threads of a threadgroup in each dimension, a multiple of `SIMD` in all.
            template: Names that the source takes as template arguments: dtypes, ints or bools.
                Each new set of values is a compilation: lengths belong into an input.
        """
        if self.built is None:
            self.built = self._build()
        result: list[mx.array] = self.built(
            inputs=list(inputs),
            output_shapes=[tuple(shape) for shape, _ in outputs],
            output_dtypes=[dtype for _, dtype in outputs],
            grid=tuple(g * t for g, t in zip(groups, threadgroup, strict=True)),
            threadgroup=threadgroup,
            template=list((template or {}).items()),
        )
        return result

    def compare(self, *variant: Any) -> Comparison:
        """Run kernel and reference on a variant's sample. Errors of either are raised."""
        with backend.use(Backend.MLX):
            arguments = self.sample_inputs(*variant)
            got, expected = self.launch(*arguments), self.reference(*arguments)
            mx.eval(got, expected)
        return _compare(self.results or self.outputs, got, expected, self.tolerance)

    def _build(self) -> Any:
        return mx.fast.metal_kernel(
            name=f"mlx_rgemma_{self.name}",
            input_names=list(self.inputs),
            output_names=list(self.outputs),
            source=source(self.file),
            header="\n".join(source(file) for file in self.headers),
        )


_kernels: dict[str, MetalKernel] = {}


class _Local(threading.local):
    trusted = False


_local = _Local()


@contextlib.contextmanager
def skip_validation() -> Iterator[None]:
    """Launch kernels without validating them first, in this thread.

    The messages of Metal's compiler then reach the caller, and a graph can be exported with its
    kernels on a machine without Metal.
    """
    before, _local.trusted = _local.trusted, True
    try:
        yield
    finally:
        _local.trusted = before


def registered() -> tuple[MetalKernel, ...]:
    """Return every kernel of the operations imported so far."""
    return tuple(_kernels.values())


def status() -> list[Status]:
    """Return the state of each kernel: one row per variant tried, or one row ``untried``."""
    rows = []
    for kernel in registered():
        for variant, error in kernel.validation.items():
            state = "off" if error else "passed"
            rows.append(Status(kernel.name, kernel.file, variant, state, error))
        if not kernel.validation:
            reason = unavailable_reason() or ""
            rows.append(Status(kernel.name, kernel.file, (), "untried", reason))
    return rows


def reset() -> None:
    """Drop every built kernel and validation, as at the start of the process."""
    for kernel in registered():
        kernel.validation.clear()
        kernel.built = None


def unavailable_reason() -> str | None:
    """Return why kernels do not run in this process, in a few words; None when they do."""
    now = backend.active()
    if now is Backend.METAL:
        return None
    if not mx.metal.is_available():
        return "no Metal on this machine"
    return f"the backend is {now.value}"


def sample(shape: Sequence[int], dtype: mx.Dtype, seed: int) -> mx.array:
    """Return normally distributed values; always the same, and the global state is left alone."""
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def token_strides(array: mx.array) -> list[int]:
    """Return the strides of a (1 or B, 1 or L) array from sequence to sequence and token to token.

    0 where one value holds for all; also for an array of one dimension, a single value.
    """
    if array.ndim == 1:
        return [0, 0]
    rows, steps = array.shape
    return [steps if rows > 1 else 0, 1 if steps > 1 else 0]


def source(file: str) -> str:
    """Return the text of a file of ``metal/``."""
    return (folder() / file).read_text(encoding="utf-8")


def folder(package: Path | None = None) -> Path:
    """Return the folder of the Metal sources: within the package (wheel) or its parent (clone)."""
    package = package or Path(__file__).resolve().parents[1]
    for found in (package / "metal", package.parent / "metal"):
        if (found / "common.metal").is_file():
            return found
    raise FileNotFoundError(f"the Metal sources are neither in {package} nor in {package.parent}")


def _compare(
    names: Sequence[str], got: Arrays, expected: Arrays, tolerance: Mapping[mx.Dtype, float]
) -> Comparison:
    errors, allowed, faults = [], [], []
    for name, one, other in zip(names, got, expected, strict=True):
        if one.shape != other.shape or one.dtype != other.dtype:
            faults.append(f"{name} is {one.shape} {one.dtype}, not {other.shape} {other.dtype}")
            continue
        bound = tolerance.get(one.dtype, 0.0)
        one, other = one.astype(mx.float32), other.astype(mx.float32)
        largest = max(_largest(other), 1e-30)
        error = _largest(one - other) / largest
        errors.append(error)
        allowed.append(bound)
        if not error <= bound:  # also when it is not a number
            faults.append(f"{name} is off by {error:.1e} of its largest value")
    return Comparison(tuple(errors), tuple(allowed), "; ".join(faults))


def _largest(array: mx.array) -> float:
    return float(mx.abs(array).max().item())  # type: ignore[arg-type]


def format_variant(variant: Iterable[Any]) -> str:
    """Format a variant for people: ``bfloat16, 256``."""
    return ", ".join(str(part).removeprefix("mlx.core.") for part in variant)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A compiler's log opens with its own noise; the first line that says "error" is the news.
    telling = [line for line in lines if "error" in line.lower()] or lines or ["no message"]
    return telling[0][:300].rstrip(".")
