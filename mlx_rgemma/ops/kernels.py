"""Which of the Metal kernels run, and how they are built, launched and tried out. No maths.

A kernel is a file ``metal/<name>.metal``: the body of one Metal function, behind the helpers of
``metal/common.metal``. The operation that owns it registers it once, on import:

    SCAN = kernels.register(
        "linear_scan",                      # metal/linear_scan.metal
        inputs=("x", "a", ...),             # buffer names, in the order of `run`'s inputs
        outputs=("y", "h_last"),
        launch=_launch,                     # (*arguments) -> results, by `SCAN.run(...)`
        reference=_reference,               # (*arguments) -> the same results, in plain MLX
        example=_example,                   # (*variant) -> arguments: tiny, of that variant
    )

and asks at each call, with what it would compile for (dtypes, a head size: the variant):

    if SCAN.usable(x.dtype, a.dtype):
        return SCAN.launch(*arguments)
    return _reference(*arguments)

`usable` follows the environment variable ``MLX_RGEMMA_KERNELS``:

* ``auto`` (the default): where Metal is available and the GPU is the default device, or where a
  stand-in has taken the place of `mx.fast.metal_kernel`. The first time that a variant is asked
  for, it is tried: `launch` and `reference` get the same example, outside of any trace. If the
  kernel does not compile or does not agree, that variant is switched off with one warning.
* ``metal``: always and untried. What Metal's compiler has to say reaches the caller, and a graph
  can be exported with its kernels on a machine without Metal.
* ``off``: never.

An example makes its arrays with `sample`, keeps at least 8 elements in each array that has them in
real use (MLX passes smaller ones in another address space, which is another compilation), and is
long enough to launch the largest threadgroup. A reference must be plain MLX: during a trial no
kernel is usable.

MLX knows no vmap of a custom kernel: `mx.vmap` works within `plain_only`. It cannot export a custom
function: `mx.export_function` works within `fused.forward_only`.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_rgemma.errors import UserError

VARIABLE = "MLX_RGEMMA_KERNELS"
MODES = ("auto", "metal", "off")
FLOATS = (mx.float32, mx.bfloat16, mx.float16)
"""The dtypes that kernels read and write; all of them compute in float32."""

BY_DTYPE = tuple((dtype,) for dtype in FLOATS)
"""The variants of a kernel that compiles once a dtype."""

SIMD = 32
"""Threads in a simdgroup; threadgroups are a multiple of it."""

TOLERANCE = {mx.float32: 1e-4, mx.bfloat16: 2.0**-7, mx.float16: 2.0**-10}
"""Largest difference in a trial, relative to the largest value: the half precisions may round to
either side. Loose on purpose: what it must find is a kernel that computes something else."""

Arrays = Sequence[mx.array]
Triple = tuple[int, int, int]


class Status(NamedTuple):
    """What has become of a kernel: `state` is ``untried``, ``agrees`` or ``off``."""

    name: str
    file: str
    variant: tuple[Any, ...]
    state: str
    reason: str


class Comparison(NamedTuple):
    """A kernel beside its reference.

    Attributes:
        errors: Largest difference of each output, relative to the largest value of the reference.
        allowed: The bound of each.
        fault: Why the two do not agree, in a few words; empty when they do.
    """

    errors: tuple[float, ...]
    allowed: tuple[float, ...]
    fault: str


@dataclass(eq=False)
class Kernel:
    """A kernel, its reference, and a way to try one against the other. Made by `register`."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    results: tuple[str, ...]
    launch: Callable[..., Arrays]
    reference: Callable[..., Arrays]
    example: Callable[..., Sequence[Any]]
    workload: Callable[..., Sequence[Any]]
    variants: tuple[tuple[Any, ...], ...]
    headers: tuple[str, ...]
    tolerance: Mapping[mx.Dtype, float]
    verdicts: dict[tuple[Any, ...], str] = field(default_factory=dict, repr=False)
    built: Callable[..., Any] | None = field(default=None, repr=False)

    @property
    def file(self) -> str:
        return f"{self.name}.metal"

    def usable(self, *variant: Any) -> bool:
        """Whether to launch the kernel for this variant; tries it the first time it is asked."""
        # Asked by every operation of every layer for every token: what is known comes first.
        now = mode()
        if _State.plain_only or now == "off":
            return False
        if now == "auto":
            if _unavailable() is not None:
                return False
            _notice_stand_in()
            fault = self.verdicts.get(variant)
            if fault is not None:
                return not fault
        if any(isinstance(part, mx.Dtype) and part not in FLOATS for part in variant):
            return False
        return now == "metal" or self._agrees(variant)

    def _agrees(self, variant: tuple[Any, ...]) -> bool:
        """Try a variant and keep the verdict."""
        try:
            fault = self.compare(*variant).fault
        except Exception as error:  # whatever a compiler or driver comes up with
            fault = f"{type(error).__name__}: {_first_line(error)}"
        self.verdicts[variant] = fault
        if fault:
            warnings.warn(
                f"Metal kernel {self.file} ({words(variant)}) is switched off: {fault}."
                " Plain MLX operations are used instead, which are slower."
                " `python -m mlx_rgemma.selftest` shows more.",
                RuntimeWarning,
                stacklevel=4,
            )
        return not fault

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
        _notice_stand_in()
        if self.built is None:
            self.built = self._build()
        return self.built(
            inputs=list(inputs),
            output_shapes=[tuple(shape) for shape, _ in outputs],
            output_dtypes=[dtype for _, dtype in outputs],
            grid=tuple(g * t for g, t in zip(groups, threadgroup, strict=True)),
            threadgroup=threadgroup,
            template=list((template or {}).items()),
        )

    def compare(self, *variant: Any) -> Comparison:
        """Run kernel and reference on the example of a variant. Errors of either are raised."""
        with plain_only():
            arguments = self.example(*variant)
            got, expected = self.launch(*arguments), self.reference(*arguments)
            mx.eval(got, expected)
        return _compare(self.results, got, expected, self.tolerance)

    def _build(self) -> Any:
        return mx.fast.metal_kernel(
            name=f"mlx_rgemma_{self.name}",
            input_names=list(self.inputs),
            output_names=list(self.outputs),
            source=source(self.file),
            header="\n".join(source(file) for file in self.headers),
        )


class _State:
    """What holds for the process."""

    registered: dict[str, Kernel] = {}  # noqa: RUF012
    factory: Any = None
    plain_only = False


def register(
    name: str,
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
    launch: Callable[..., Arrays],
    reference: Callable[..., Arrays],
    example: Callable[..., Sequence[Any]],
    workload: Callable[..., Sequence[Any]] | None = None,
    results: Sequence[str] | None = None,
    variants: Sequence[tuple[Any, ...]] = BY_DTYPE,
    headers: Sequence[str] = ("common.metal",),
    tolerance: Mapping[mx.Dtype, float] = TOLERANCE,
) -> Kernel:
    """Make a kernel known; nothing is read or built before it is needed.

    Args:
        name: Of the file ``metal/<name>.metal``.
        inputs, outputs: Names of the buffers, as the source has them.
        launch: ``(*arguments) -> results``, through `Kernel.run`.
        reference: The same in plain MLX operations.
        example: ``(*variant) -> arguments``.
        workload: As `example`, but as large as in the 2B model at 2048 tokens: for timing only.
        results: Names of what `launch` returns, where that is not `outputs`.
        variants: The variants that the self-test command goes through.
        headers: Files that come before the function, in this order.
        tolerance: Bound of a trial by output dtype; see `TOLERANCE`.
    """
    kernel = Kernel(
        name=name,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        results=tuple(outputs if results is None else results),
        launch=launch,
        reference=reference,
        example=example,
        workload=example if workload is None else workload,
        variants=tuple(variants),
        headers=tuple(headers),
        tolerance=tolerance,
    )
    _State.registered[name] = kernel
    return kernel


def registered() -> tuple[Kernel, ...]:
    """Every kernel of the operations imported so far."""
    return tuple(_State.registered.values())


def status() -> list[Status]:
    """What is known of each kernel: one row a variant tried, or one row ``untried``."""
    _notice_stand_in()
    rows = []
    for kernel in registered():
        for variant, fault in kernel.verdicts.items():
            state = "off" if fault else "agrees"
            rows.append(Status(kernel.name, kernel.file, variant, state, fault))
        if not kernel.verdicts:
            rows.append(Status(kernel.name, kernel.file, (), "untried", unavailable() or ""))
    return rows


def forget() -> None:
    """Drop every built kernel and verdict, as at the start of the process."""
    for kernel in registered():
        kernel.verdicts.clear()
        kernel.built = None


def mode() -> str:
    """The value of ``MLX_RGEMMA_KERNELS``.

    Raises:
        UserError: If it is none of `MODES`.
    """
    value = os.environ.get(VARIABLE, "auto")
    if value not in MODES:
        raise UserError(f"{VARIABLE}: found '{value}', expected one of {', '.join(MODES)}.")
    return value


def unavailable() -> str | None:
    """Why kernels do not run here, in a few words; None when they do."""
    if mode() == "off":
        return f"{VARIABLE} is off"
    return None if mode() == "metal" else _unavailable()


def _unavailable() -> str | None:
    if stand_in():
        return None
    if not mx.metal.is_available():
        return missing()
    return None if mx.default_device().type == mx.gpu else "the default device is the CPU"


def missing() -> str | None:
    """What kernels would need that this machine has not; None when they could run."""
    return None if stand_in() or mx.metal.is_available() else "no Metal on this machine"


def stand_in() -> bool:
    """Whether something other than MLX's own function builds the kernels."""
    return type(mx.fast.metal_kernel).__module__ != "nanobind"


@contextlib.contextmanager
def plain_only() -> Iterator[None]:
    """Within this context no kernel is usable; one that is launched runs all the same."""
    before, _State.plain_only = _State.plain_only, True
    try:
        yield
    finally:
        _State.plain_only = before


def sample(shape: Sequence[int], dtype: mx.Dtype, seed: int) -> mx.array:
    """Normal numbers for an example; always the same, and the global random state is left alone."""
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def source(file: str) -> str:
    """The text of a file of ``metal/``."""
    return (folder() / file).read_text(encoding="utf-8")


def folder(package: Path | None = None) -> Path:
    """Where the Metal sources are: inside the package in a wheel, beside it in a clone."""
    package = package or Path(__file__).resolve().parents[1]
    for found in (package / "metal", package.parent / "metal"):
        if (found / "common.metal").is_file():
            return found
    raise FileNotFoundError(f"the Metal sources are neither in {package} nor beside it")


def _notice_stand_in() -> None:
    """Kernels built, and verdicts given, through one factory mean nothing for another."""
    if mx.fast.metal_kernel is not _State.factory:
        forget()
        _State.factory = mx.fast.metal_kernel


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


def words(variant: Iterable[Any]) -> str:
    """A variant as people write it: ``bfloat16, 256``."""
    return ", ".join(str(part).removeprefix("mlx.core.") for part in variant)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A compiler's log opens with its own noise; the first line that says "error" is the news.
    telling = [line for line in lines if "error" in line.lower()] or lines or ["no message"]
    return telling[0][:300].rstrip(".")
