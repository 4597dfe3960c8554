"""Check the kernel of a recorded launch without running it again."""

from __future__ import annotations

from collections.abc import Collection

import mlx.core as mx

from .capture import Capture, capture_call
from .emulated_kernel import Launch
from .errors import Finding
from .static_check import Report, check_source

# MLX passes an input of fewer elements in `constant` instead of `device` memory.
TINY = 8


def check_launch(
    launch: Launch,
    *,
    portable: bool = False,
    never_tiny: Collection[str] = (),
    known_names: Collection[str] = (),
) -> Report:
    """Check the kernel of a launch with the inputs of the call, and with tiny and large inputs.

    MLX passes an input of fewer than 8 elements in `constant` memory, a larger one in `device`
    memory. A pointer that names the other address space does not compile.

    Args:
        launch: a launch that `emulate` recorded.
        portable: also report features that CUDA does not have or interprets differently.
        never_tiny: names of inputs that have 8 elements or more in every call.
        known_names: names of Metal that no kernel of MLX or mlx-lm uses.
    """
    captures = {c.source: c for c in (launch.capture, *_other_sizes(launch, never_tiny))}
    reports = [
        check_source(c.source, c.instance, portable=portable, known_names=known_names)
        for c in captures.values()
    ]
    findings = [f for report in reports for f in report.findings]
    if portable:
        findings += _geometry(launch)
    skipped = [s for report in reports for s in report.skipped]
    return Report(tuple(dict.fromkeys(findings)), tuple(dict.fromkeys(skipped)))


def _other_sizes(launch: Launch, never_tiny: Collection[str]) -> list[Capture]:
    """Return captures of the same call with all inputs tiny, and with all inputs large."""
    kernel = launch.definition.build()
    captures = []
    for size in (1, TINY):
        inputs = []
        for info in launch.inputs:
            last = TINY if info.name in never_tiny else size
            # The rank is part of the signature; an array of rank 0 is never large.
            shape = (1,) * (len(info.shape) - 1) + (last,) if info.shape else ()
            inputs.append(mx.zeros(shape, dtype=info.dtype))
        captures.append(
            capture_call(
                kernel,
                inputs,
                output_shapes=[info.shape for info in launch.outputs],
                output_dtypes=[info.dtype for info in launch.outputs],
                grid=launch.grid,
                threadgroup=launch.threadgroup,
                template=list(launch.template),
                init_value=launch.init_value,
            )
        )
    return captures


def _geometry(launch: Launch) -> list[Finding]:
    """Report partial threadgroups, which CUDA does not have, and partial simdgroups."""
    found = []
    for axis, (grid, group) in enumerate(zip(launch.grid, launch.threadgroup, strict=True)):
        if grid % group:
            message = f"grid {grid} is no multiple of the threadgroup {group} in dimension {axis}"
            found.append(Finding(message))
    threads = launch.threadgroup[0] * launch.threadgroup[1] * launch.threadgroup[2]
    if threads % 32:
        message = f"threadgroup of {threads} threads is no multiple of a simdgroup of 32"
        found.append(Finding(message))
    return found
