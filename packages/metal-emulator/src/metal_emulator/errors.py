"""The defects of a kernel, as data and as an exception."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Finding(NamedTuple):
    """A defect of a kernel.

    Attributes:
        message: description of the defect.
        line: line of the generated source, or 0 if no single line is at fault.
        text: that line.
    """

    message: str
    line: int = 0
    text: str = ""

    def __str__(self) -> str:
        where = f"line {self.line}: " if self.line else ""
        shown = f"\n    {self.text}" if self.text else ""
        return f"{where}{self.message}{shown}"


class KernelError(Exception):
    """A kernel breaks a rule of Metal.

    Attributes:
        kernel: name of the kernel.
        findings: all findings, the first one first.
    """

    def __init__(self, kernel: str, findings: Sequence[Finding]) -> None:
        self.kernel = kernel
        self.findings = tuple(findings)
        super().__init__(f"[{kernel}] " + "\n".join(str(finding) for finding in findings))


def finding(message: str, line: int, source: str) -> Finding:
    """Return a finding that quotes its line of `source`."""
    lines = source.splitlines()
    text = lines[line - 1].strip() if 0 < line <= len(lines) else ""
    return Finding(message, line, text)
