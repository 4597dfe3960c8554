"""What can be said about a kernel without running it.

Metal's compiler is not here, so its verdict is approached from several sides, each with reasons of
its own to reject: rules on the text, words that no shipped kernel uses, pointers that change their
address space, a C++ compiler's errors and call graph, and clang with address spaces as types. A
side that cannot run says why in `Report.skipped`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import mlx.core as mx

from .address_spaces import space_changes
from .capture import Capture, capture_call
from .compile_check import compile_findings
from .errors import Finding, KernelError
from .lint import lint
from .standin import Launch
from .toolchain import compiler
from .type_check import type_checker, type_findings
from .vocabulary import unknown_words

# MLX passes an input of fewer elements as `constant` instead of `device` memory.
TINY = 8


class Report(NamedTuple):
    """What a static check found.

    Attributes:
        findings: what is wrong; empty for a good kernel.
        skipped: the checks that could not run, each with its reason.
    """

    findings: tuple[Finding, ...]
    skipped: tuple[str, ...] = ()

    def require(self, kernel: str) -> None:
        """Raise a `KernelError` if anything is wrong."""
        if self.findings:
            raise KernelError(kernel, self.findings)


def check_source(source: str, instance: str, *, portable: bool = False) -> Report:
    """Check one generated source.

    Args:
        source: the Metal text, as captured.
        instance: the expression that names the kernel function, `f<bfloat16_t, 64>`.
        portable: also ask for what makes the text mean the same as CUDA.
    """
    findings = [*lint(source, portable), *unknown_words(source), *space_changes(source)]
    skipped = []
    found, reason = compiler()
    if found is None:
        skipped.append(f"compiler: {reason}")
    else:
        findings += compile_findings(found, source, instance)
    clang, reason = type_checker()
    if clang is None:
        skipped.append(f"address spaces as types: {reason}")
    else:
        findings += type_findings(clang, source, instance)
    return Report(tuple(dict.fromkeys(findings)), tuple(skipped))


def check_launch(
    launch: Launch, *, portable: bool = False, never_tiny: Collection[str] = ()
) -> Report:
    """Check the kernel of a recorded launch: as it was called, and with tiny and large inputs.

    An input of fewer than 8 elements lies in `constant` memory, a larger one in `device` memory: a
    pointer with the other word does not compile. Both happen to the same kernel.

    Args:
        launch: what `executed` recorded.
        portable: also ask for what makes the text mean the same as CUDA.
        never_tiny: names of inputs that have 8 elements or more in every call.
    """
    captures = {c.source: c for c in (launch.capture, *_other_sizes(launch, never_tiny))}
    reports = [check_source(c.source, c.instance, portable=portable) for c in captures.values()]
    findings = [f for report in reports for f in report.findings]
    if portable:
        findings += _geometry(launch)
    skipped = [s for report in reports for s in report.skipped]
    return Report(tuple(dict.fromkeys(findings)), tuple(dict.fromkeys(skipped)))


def _other_sizes(launch: Launch, never_tiny: Collection[str]) -> list[Capture]:
    """The same call with all inputs tiny, and with all inputs large."""
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
    """CUDA has no partial threadgroups, and simdgroup operations want whole simdgroups."""
    found = []
    for axis, (grid, group) in enumerate(zip(launch.grid, launch.threadgroup, strict=True)):
        if grid % group:
            found.append(
                Finding(
                    f"grid {grid} is no whole number of threadgroups {group} in dimension {axis}"
                )
            )
    threads = launch.threadgroup[0] * launch.threadgroup[1] * launch.threadgroup[2]
    if threads % 32:
        found.append(Finding(f"threadgroup of {threads} threads is no whole number of simdgroups"))
    return found
