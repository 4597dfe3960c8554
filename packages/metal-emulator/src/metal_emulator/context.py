"""Replace `mx.fast.metal_kernel` by a function whose kernels run on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx

from .capture import KernelDefinition
from .emulated_kernel import EmulatedKernel, Launch, Settings, active
from .run import RunOptions

MODES = ("fast", "checked")


@contextlib.contextmanager
def emulate(
    mode: str = "fast",
    order: str = "forward",
    record: list[Launch] | None = None,
    *,
    seed: int = 0,
    strict: bool = True,
    flush_denormals: bool = False,
    allow: Sequence[str] = (),
    time_limit_s: int = 120,
    keep_values: bool = False,
    as_default_device: bool = False,
) -> Iterator[None]:
    """Run custom Metal kernels on the CPU within this context.

    Inside, `mx.fast.metal_kernel` builds an `EmulatedKernel` and `mx.metal.is_available` returns
    True. `mx.compile` is disabled, because an emulated kernel evaluates its inputs. An emulated
    kernel uses the options of the innermost context at the time of the call. It can be kept and
    called in another context, but not outside of any.

    Args:
        mode: `fast`, or `checked`: detect races, out-of-bounds and uninitialised accesses.
        order: order of the threads: `forward`, `reverse` or `random`. Results must not depend on
            it.
        record: a list that receives a `Launch` per call.
        seed: seed of the random order.
        strict: report a simdgroup operation that not all lanes reach.
        flush_denormals: flush denormal float results to zero, as a GPU may.
        allow: accept findings whose message contains one of these texts.
        time_limit_s: processor time after which a launch counts as an endless loop.
        keep_values: keep the buffers of each launch, with the values of inputs and outputs.
        as_default_device: make `mx.default_device()` report a GPU.

    Raises:
        ValueError: the mode or the order is unknown.
        KernelError: from the call of a kernel that breaks a rule.
    """
    if mode not in MODES:
        raise ValueError(f"mode: found '{mode}', expected one of {', '.join(MODES)}")
    checked = mode == "checked"
    options = RunOptions(checked, order, seed, strict, flush_denormals, tuple(allow), time_limit_s)
    with contextlib.ExitStack() as undo:
        active.append(Settings(options, record, keep_values))
        undo.callback(active.pop)
        _replace(undo, mx.fast, "metal_kernel", metal_kernel)
        _replace(undo, mx.metal, "is_available", lambda: True)
        if as_default_device:
            gpu = mx.Device(mx.gpu, 0)
            _replace(undo, mx, "default_device", lambda: gpu)
        if _compile_is_enabled():
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
) -> EmulatedKernel:
    """Return an emulated kernel; the arguments are those of `mx.fast.metal_kernel`."""
    return EmulatedKernel(
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


def _replace(undo: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    undo.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _compile_is_enabled() -> bool:
    """Return whether `mx.compile` compiles; MLX has no function for it."""
    calls = []

    def count(x: mx.array) -> mx.array:
        calls.append(1)
        return x + 1

    probe = mx.compile(count)
    zero = mx.zeros(())
    mx.eval(probe(zero), probe(zero))
    return len(calls) == 1
