"""Threads that look at what others write, without the interpreter's lock."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import int64, types
from numba.core import cgutils
from numba.extending import intrinsic

from mlx_rgemma.cpu.kernels.compiler import kernel

SPINS_BEFORE_YIELD = 1 << 14
"""How often a thread spins, about 5 us, before it lets others have its thread."""


def _place(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    """Where the first number of the only argument stands."""
    return context.make_array(signature.args[0])(context, builder, arguments[0]).data


@intrinsic
def _atomic_load(_, counter):
    """The first number of an array, from memory each time, and what was written before it."""

    def generate(context, builder, signature, arguments):
        place = _place(context, builder, signature, arguments)
        return builder.load_atomic(place, "acquire", 8)

    return int64(counter), generate


@intrinsic
def _atomic_add(_, counter):
    """Add 1 to the first number of an array, at once, after all that was written before."""

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
    """Until the counter, (1,) int64, is not what it was before; so many spins at most."""
    for _ in range(spins):
        if _atomic_load(counter) != before:
            break
    for _ in range(more_spins):
        _atomic_load(counter)


@kernel
def barrier_wait(counter, number):
    """Wait until so many have come here, or to places before, of this counter, (1,) int64."""
    _atomic_add(counter)
    spins = 0
    while _atomic_load(counter) < number:
        spins += 1
        if spins > SPINS_BEFORE_YIELD:
            _sched_yield()
