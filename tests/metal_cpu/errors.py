"""What a kernel did wrong, as data and as one exception."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Finding(NamedTuple):
    """One defect: what, and on which line of the generated source (0: no single line)."""

    message: str
    line: int = 0
    text: str = ""

    def __str__(self) -> str:
        where = f"line {self.line}: " if self.line else ""
        shown = f"\n    {self.text}" if self.text else ""
        return f"{where}{self.message}{shown}"


class KernelError(Exception):
    """A kernel broke a rule of Metal, or of this project.

    Attributes:
        kernel: the kernel's name.
        findings: everything that was found, first things first.
    """

    def __init__(self, kernel: str, findings: Sequence[Finding]) -> None:
        self.kernel = kernel
        self.findings = tuple(findings)
        super().__init__(f"[{kernel}] " + "\n".join(str(finding) for finding in findings))


def finding(message: str, line: int, source: str) -> Finding:
    """A finding that quotes its line of `source`."""
    lines = source.splitlines()
    text = lines[line - 1].strip() if 0 < line <= len(lines) else ""
    return Finding(message, line, text)
