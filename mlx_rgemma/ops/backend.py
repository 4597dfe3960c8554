"""The one rule that decides which implementation of an operation runs.

An `Operation` has a reference in plain MLX, the same text on every machine. Faster implementations
register for a `Backend`:

    rms_norm = Operation(reference)

    @rms_norm.implementation(Backend.METAL, supports=has_kernel)
    def launch(x, weight, *, eps, dtype): ...

A call takes the first implementation of the active backend that supports its arguments, and the
reference where there is none. The environment variable ``MLX_RGEMMA_BACKEND`` (``metal``, ``cpu``
or ``mlx``) overrides the choice for the process, `use` for a block of code in one thread.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from enum import Enum
from functools import cache, update_wrapper
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_rgemma.errors import UserError, shown
from mlx_rgemma.ops.autograd import is_inference, with_reference_gradient

VARIABLE = "MLX_RGEMMA_BACKEND"


class Backend(Enum):
    """Where operations run: custom Metal kernels, Linux CPU kernels, or MLX's own operations."""

    METAL = "metal"
    CPU = "cpu"
    MLX = "mlx"


class _Local(threading.local):
    override: Backend | None = None


_local = _Local()


def active() -> Backend:
    """Return the backend of this call.

    Raises:
        UserError: If ``MLX_RGEMMA_BACKEND`` names no backend.
    """
    if _local.override is not None:
        return _local.override
    value = os.environ.get(VARIABLE)
    if value is not None:
        return _named(value)
    if mx.default_device().type == mx.gpu:
        return Backend.METAL if mx.metal.is_available() else Backend.MLX
    return Backend.CPU if _cpu() is not None else Backend.MLX


@contextlib.contextmanager
def use(backend: Backend) -> Iterator[None]:
    """Run the operations of this thread on one backend.

    Raises:
        UserError: If it is the CPU backend, and this is not Linux.
    """
    if backend is Backend.CPU:
        _require_cpu("backend.use")
    before, _local.override = _local.override, backend
    try:
        yield
    finally:
        _local.override = before


@cache
def _named(value: str) -> Backend:
    names = [backend.value for backend in Backend]
    if value not in names:
        raise UserError(f"{VARIABLE}: found {shown(value)}, expected one of {', '.join(names)}.")
    if value == Backend.CPU.value:
        _require_cpu(VARIABLE)
    return Backend(value)


def _require_cpu(place: str) -> None:
    if _cpu() is None:
        raise UserError(f"{place}: found 'cpu', which is for Linux only; use 'mlx' instead.")


@cache
def _cpu() -> Any:
    """Import `mlx_rgemma.cpu`, which registers its implementations; None where it cannot run."""
    if sys.platform != "linux":
        return None
    try:
        return importlib.import_module("mlx_rgemma.cpu")
    except ImportError:
        return None


class _Implementation(NamedTuple):
    function: Callable[..., Any]
    supports: Callable[..., bool]
    inference_only: bool


class Operation:
    """An operation: its reference in plain MLX, and faster implementations of it.

    Arrays (or None) are positional arguments, everything else is passed by keyword.
    """

    def __init__(self, reference: Callable[..., Any]) -> None:
        self.reference = reference
        self._implementations: dict[Backend, list[_Implementation]] = {}
        update_wrapper(self, reference)

    def implementation(
        self,
        backend: Backend,
        *,
        supports: Callable[..., bool] = lambda *arrays, **options: True,
        gradient: str = "reference",
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register an implementation; those registered first are preferred.

        Args:
            backend: The backend it belongs to.
            supports: Called with the operation's arguments; whether it can compute them.
            gradient: ``"reference"`` to differentiate the reference instead, ``"own"`` if the
                implementation has gradients, ``"none"`` if it is for inference alone. An
                implementation without gradients may return NotImplemented where its arguments have
                no values yet (within `mx.compile` and `mx.vmap`).
        """

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            run = function
            if gradient == "reference":
                run = with_reference_gradient(function, self.reference)
            entry = _Implementation(run, supports, gradient == "none")
            self._implementations.setdefault(backend, []).append(entry)
            return function

        return register

    @contextlib.contextmanager
    def replaced(self, backend: Backend, function: Callable[..., Any]) -> Iterator[None]:
        """Run another function as the implementation of a backend, to record or count calls."""
        before = self._implementations.get(backend, [])
        self._implementations[backend] = [_Implementation(function, lambda *a, **o: True, False)]
        try:
            yield
        finally:
            self._implementations[backend] = before

    def __call__(self, *arrays: Any, **options: Any) -> Any:
        for entry in self._implementations.get(active(), ()):
            if entry.inference_only and not is_inference():
                continue
            if entry.supports(*arrays, **options):
                result = entry.function(*arrays, **options)
                if result is not NotImplemented:
                    return result
        return self.reference(*arrays, **options)


def prepare(model: Any, **options: Any) -> int:
    """Lay out a loaded model's weights for the active backend.

    Returns:
        Bytes of dequantized weights that are kept beside the quantized ones.
    """
    return _cpu().prepare(model, **options) if active() is Backend.CPU else 0


def decoder(model: Any) -> Callable[..., mx.array | None] | None:
    """Return a faster decode step of a whole model, or None where the backend has none.

    It takes ``(tokens, cache, last_only=)`` and returns logits, or None for calls that it does not
    support.
    """
    return _cpu().decoder(model) if active() is Backend.CPU else None


def detach(*arrays: mx.array) -> tuple[mx.array, ...]:
    """Return arrays for a computation of which only results are kept while gradients are traced.

    A backend that evaluates its inputs at once returns copies that no traced graph knows.
    """
    return _cpu().detach(*arrays) if active() is Backend.CPU else arrays


def compile_seconds(since: float) -> float:
    """Return the seconds spent compiling kernels since a moment of `time.perf_counter`."""
    return _cpu().compile_seconds(since) if active() is Backend.CPU else 0.0


def optimizer(inner: Any) -> Any:
    """Return the backend's form of one of MLX's optimizers, which computes the same updates."""
    return _cpu().optimizer(inner) if active() is Backend.CPU else inner
