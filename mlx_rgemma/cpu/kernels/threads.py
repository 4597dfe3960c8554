"""Atomics, barriers and spin waits without the GIL."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import int64, types
from numba.core import cgutils
from numba.extending import intrinsic

from mlx_rgemma.cpu.kernels.compiler import kernel

SPINS_BEFORE_YIELD = 1 << 14
"""Spins of a thread at a barrier, about 5 us, before it yields its core."""


def _place(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    """Return the address of the only argument's first element."""
    return context.make_array(signature.args[0])(context, builder, arguments[0]).data


@intrinsic
def _atomic_load(_, counter):
    """Load the first element of an array, with acquire order."""

    def generate(context, builder, signature, arguments):
        place = _place(context, builder, signature, arguments)
        return builder.load_atomic(place, "acquire", 8)

    return int64(counter), generate


@intrinsic
def _atomic_add(_, counter):
    """Add 1 to the first element of an array, with acquire-release order."""

    def generate(context, builder, signature, arguments):
        place = _place(context, builder, signature, arguments)
        return builder.atomic_rmw("add", place, ir.IntType(64)(1), "acq_rel")

    return int64(counter), generate


@intrinsic
def _sched_yield(_):
    """Let another thread have the thread, if one waits for it."""

    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.IntType(32), [])
        function = cgutils.get_or_insert_function(builder.module, kind, "sched_yield")
        builder.call(function, [])
        return context.get_dummy_value()

    return types.void(), generate


@kernel
def spin_wait(counter, before, spins, more_spins):
    """Spin until the counter, (1,) int64, differs from `before`, at most `spins` times."""
    for _ in range(spins):
        if _atomic_load(counter) != before:
            break
    for _ in range(more_spins):
        _atomic_load(counter)


@kernel
def barrier_wait(counter, number):
    """Barrier: block until `counter`, (1,) int64, has reached `number` arrivals."""
    _atomic_add(counter)
    spins = 0
    while _atomic_load(counter) < number:
        spins += 1
        if spins > SPINS_BEFORE_YIELD:
            _sched_yield()
