"""Compiled loops over the memory of MLX's arrays, in place of chains of operations on a Linux CPU.

MLX computes each elementwise operation there by itself and on one thread: GELU is thirty operations
that go through memory thirty times. A loop that Numba compiles (`compiled`) goes through it
once, on all cores. The price is that its inputs must be there: they are computed before it runs,
not when somebody asks for its result. So loops serve long pieces of a prompt, where nothing is
gained by putting work off, Adam's updates, and decode steps that are loops from end to end
(`griffin.loop_step`); one that goes through MLX's operations runs none. Nor does the forward pass
of a model that is trained: computed early, all that it makes would be held for its gradient.

Within `mx.compile` and `mx.vmap`, where arrays have no values yet, plain operations take over; with
``MLX_RGEMMA_KERNELS=off``, everywhere.
"""

from __future__ import annotations

import logging
import time
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rgemma.ops import kernels
from mlx_rgemma.ops.fused import is_forward_only
from mlx_rgemma.ops.processor import cores, on_linux_cpu
from mlx_rgemma.ops.team import members, share

log = logging.getLogger(__name__)

View = np.ndarray[Any, Any]

LEAST = 1 << 16
"""Elements from which on a loop is worth computing its inputs at once."""
FEWEST_TOKENS = 16
"""Tokens from which on a call is more than the steps of a decode loop."""


def worthwhile(x: mx.array) -> bool:
    """Whether loops are to run over activations like these, (..., L, channels)."""
    return is_forward_only() and x.ndim > 1 and x.shape[-2] >= FEWEST_TOKENS and many(x.size)


def many(elements: int) -> bool:
    """Whether so many elements are worth a loop here: not where kernels run, or are off."""
    if elements < LEAST or not on_linux_cpu():
        return False
    return kernels.mode() == "auto" and not kernels.stand_in() and _installed()


def ready(*arrays: mx.array) -> list[mx.array] | None:
    """The arrays, computed now, as loops take them: contiguous, floats as fp32.

    None within `mx.compile` and `mx.vmap`.
    """
    found = [x.astype(mx.float32) if mx.issubdtype(x.dtype, mx.floating) else x for x in arrays]
    try:
        mx.eval(found)
    except ValueError:  # "not allowed" where arrays stand for others
        return None
    lying = [np.asarray(x).flags.c_contiguous for x in found]
    if not all(lying):
        found = [x if lies else mx.contiguous(x) for x, lies in zip(found, lying, strict=True)]
        mx.eval(found)
    return found


def run(name: str, units: int, *arguments: Any) -> None:
    """Run a loop of `compiled` over all units of its work, a share on each core.

    Args:
        name: The loop's.
        units: Of its work.
        arguments: MLX's arrays as `ready` gives them, NumPy's for what the loop makes, numbers.
    """
    loop = getattr(_loops(), name)
    memory = [np.asarray(x) if isinstance(x, mx.array) else x for x in arguments]
    shares = max(min(cores(), units), 1)
    share(loop, [units * i // shares for i in range(shares + 1)], memory)


def alone(name: str, *arguments: Any) -> None:
    """Run a loop of `compiled` on this thread, with these arguments and no others."""
    getattr(_loops(), name)(*arguments)


def together(name: str, number: int, *arguments: Any) -> None:
    """Run a loop of `compiled` on some cores at the same time, which meet on the way.

    Args:
        name: The loop's.
        number: Of cores; `crew` at most.
        arguments: NumPy's arrays, numbers, and tuples of both, behind the number of cores and the
            counter of arrivals.
    """
    arrivals = np.zeros(1, np.int64)

    def let_go() -> None:
        arrivals[0] = 1 << 62

    shares = range(number + 1)
    share(getattr(_loops(), name), shares, (number, arrivals, *arguments), let_go)


def crew() -> int:
    """Cores that can work together."""
    return min(cores(), members())


def constant(name: str) -> int:
    """A whole number of `compiled`, that depends on the processor."""
    found: int = getattr(_loops(), name)
    return found


@cache
def _installed() -> bool:
    return find_spec("numba") is not None


@cache
def _loops() -> Any:
    found = import_module("mlx_rgemma.ops.compiled")  # half a second: not before it is needed
    _watch_compiler()
    return found


COMPILING = "Compiling kernels for this CPU, once: about 20 s"
_compiled: list[tuple[float, float]] = []
"""When each compilation of this process began and ended."""


def compile_seconds(since: float) -> float:
    """Return the seconds of compilation since a moment of `time.perf_counter`.

    Speeds leave them out: a loop is compiled on its first run on a machine, and kept on disk.
    """
    return sum(max(end - max(begin, since), 0.0) for begin, end in _compiled)


def _watch_compiler() -> None:
    """Record when loops are compiled; log one line before the first."""
    from numba.core import event

    class Listener(event.Listener):
        """Numba compiles one function at a time, and within it those that it calls."""

        depth, begin = 0, 0.0

        def on_start(self, event: Any) -> None:
            if self._ours(event):
                if self.depth == 0:
                    if not _compiled:
                        log.info(COMPILING)
                    self.begin = time.perf_counter()
                self.depth += 1

        def on_end(self, event: Any) -> None:
            if self._ours(event):
                self.depth -= 1
                if self.depth == 0:
                    _compiled.append((self.begin, time.perf_counter()))

        def _ours(self, event: Any) -> bool:
            module: str = event.data["dispatcher"].py_func.__module__
            return module.startswith("mlx_rgemma.")

    event.register("numba:compile", Listener())
