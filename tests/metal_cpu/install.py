"""Make `mx.fast.metal_kernel` return kernels that run on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx

from .capture import KernelDefinition
from .run import RunOptions
from .standin import Launch, Settings, StandIn, active

MODES = ("fast", "checked")


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
    time_limit_s: int = 120,
    keep_values: bool = False,
    as_default_device: bool = False,
) -> Iterator[None]:
    """Within this context custom Metal kernels are executed on the CPU.

    `mx.fast.metal_kernel` builds stand-ins, `mx.metal.is_available` says True, and `mx.compile` is
    off, because a stand-in evaluates its inputs. A stand-in asks for the innermost context when it
    is called: it may be kept and called again in another one, but not outside.

    Args:
        mode: `fast`, or `checked`: every access is watched for races, bounds and unwritten memory.
        order: in which threads run: `forward`, `reverse` or `random`. No result may depend on it.
        record: a list to which each call appends a `Launch`.
        seed: of the random order.
        strict: a simdgroup operation that not all lanes reach is an error.
        flush_denormals: float results too small for a normal number become zero, as a GPU may do.
        allow: findings whose message contains one of these texts are accepted.
        time_limit_s: processor time after which a launch is taken to loop forever.
        keep_values: launches keep their buffers, with the values of inputs and outputs.
        as_default_device: `mx.default_device()` reports a GPU, for code that asks.

    Raises:
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


def _replace(undo: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    undo.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _compile_is_on() -> bool:
    """Whether `mx.compile` compiles: MLX has a switch for it, but no way to read the switch."""
    calls = []

    def count(x: mx.array) -> mx.array:
        calls.append(1)
        return x + 1

    probe = mx.compile(count)
    zero = mx.zeros(())
    mx.eval(probe(zero), probe(zero))
    return len(calls) == 1
