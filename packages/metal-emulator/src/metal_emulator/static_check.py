"""Check the source of a kernel without running it.

Apple's compiler runs on Macs only. Several partial checks take its place: rules on the text, names
that no shipped kernel uses, pointers that change their address space, the errors and the call graph
of a C++ compiler, and clang with address spaces as types. `Report.skipped` lists the checks that
could not run.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from .address_spaces import space_changes
from .build import MLX_INCLUDE
from .compile_check import compile_findings
from .errors import Finding, KernelError
from .lint import lint
from .toolchain import compiler
from .type_check import type_checker, type_findings
from .vocabulary import unknown_names


class Report(NamedTuple):
    """Result of the static checks.

    Attributes:
        findings: all defects; empty for a good kernel.
        skipped: the checks that could not run, each with its reason.
    """

    findings: tuple[Finding, ...]
    skipped: tuple[str, ...] = ()

    def require(self, kernel: str) -> None:
        """Raise a `KernelError` if there is a finding."""
        if self.findings:
            raise KernelError(kernel, self.findings)


def check_source(
    source: str, instance: str, *, portable: bool = False, known_names: Collection[str] = ()
) -> Report:
    """Check the source of a kernel.

    Args:
        source: the Metal source.
        instance: expression of the kernel function, `f<bfloat16_t, 64>`.
        portable: also report features that CUDA does not have or interprets differently.
        known_names: names of Metal that no kernel of MLX or mlx-lm uses.
    """
    findings = [*lint(source, portable), *space_changes(source)]
    skipped = []
    if MLX_INCLUDE is None:
        skipped.append("names: MLX, whose kernels have the known names, is not installed")
    else:
        findings += unknown_names(source, known_names)
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
