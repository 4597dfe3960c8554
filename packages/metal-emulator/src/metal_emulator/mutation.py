"""Mutation testing of kernels: small edits of the source that a test suite must detect.

A mutant is a slip that the author of a kernel could make. Its `check` must kill it:

- `values`: the results are wrong, in any order of threads, and nothing else is reported.
- `checked`: the checked mode of `emulate` reports it. The values may be right by chance.
- `static`: the static checks reject the source. The kernel runs, and its values are right.

Lists of mutants are data, one file per kernel: `mutants/scale.py` defines `MUTANTS` for
`scale.metal`:

    MUTANTS = [
        checked("no barrier", "threadgroup_barrier(mem_flags::mem_threadgroup);", ""),
        values("no bias", " + bias[d]", ""),
    ]

A test applies each mutant, makes its kernels from the mutated files, and requires the kill:

    @pytest.mark.parametrize("mutant", load("mutants")["scale"], ids=str)
    def test_mutant_is_killed(mutant, monkeypatch):
        monkeypatch.setattr(kernels, "read", mutant.apply(kernels.read))
        require_killed(mutant, lambda mode: run_scale_and_compare(mode))
"""

from __future__ import annotations

import runpy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .errors import Finding, KernelError

if TYPE_CHECKING:
    from .emulated_kernel import Launch

CHECKS = ("values", "checked", "static")

Read = Callable[[str], str]
"""Return the text of a source file, by its name."""

Run = Callable[[str], "Sequence[Launch]"]
"""Run the kernel in a mode of `emulate`, assert its values, and return its launches."""

StaticCheck = Callable[["Launch"], Sequence[Finding]]
"""Return the findings of the static checks on a launch."""


class Edit(NamedTuple):
    """One replacement in a source file.

    Attributes:
        old: the text that is replaced.
        new: the text that takes its place.
        occurrence: index of the occurrence of `old`, from the end if negative; None replaces all.
        file: name of the source file; the kernel's own if empty.
    """

    old: str
    new: str
    occurrence: int | None = 0
    file: str = ""

    def apply(self, text: str) -> str:
        """Return the edited text.

        Raises:
            ValueError: `old` does not occur, or not often enough.
        """
        parts = text.split(self.old)
        count = len(parts) - 1
        if self.occurrence is None:
            if count:
                return self.new.join(parts)
        elif -count <= self.occurrence < count:
            split = self.occurrence % count + 1
            return self.old.join(parts[:split]) + self.new + self.old.join(parts[split:])
        raise ValueError(f"'{self.old}' occurs {count} times in {self.file or 'the source'}")


@dataclass(frozen=True)
class Mutant:
    """A wrong kernel.

    Attributes:
        name: description of the defect.
        check: the check that must kill it, one of `CHECKS`.
        edits: the edits that make it, in order.
        case: name of the inputs that reveal it, for the test to interpret.
        message: a text in the message of the finding that must be reported.
        line: a text in the source line that this finding must name; if empty, it names no line.
            Only with a message.
    """

    name: str
    check: str
    edits: tuple[Edit, ...]
    case: str = ""
    message: str = ""
    line: str = ""

    def __post_init__(self) -> None:
        if self.check not in CHECKS:
            raise ValueError(f"check: found '{self.check}', expected one of {', '.join(CHECKS)}")

    def __str__(self) -> str:
        return self.name

    def apply(self, read: Read) -> Read:
        """Return a function that reads the mutated sources.

        Args:
            read: returns the text of a source file, by its name.

        Raises:
            ValueError: an edit does not apply, or changes nothing.
        """
        changed: dict[str, str] = {}
        for edit in self.edits:
            before = changed[edit.file] if edit.file in changed else read(edit.file)
            try:
                changed[edit.file] = edit.apply(before)
            except ValueError as error:
                raise ValueError(f"mutant '{self.name}' does not apply: {error}") from error
            if changed[edit.file] == before:
                raise ValueError(f"mutant '{self.name}' changes nothing in {edit.file}")
        return lambda file: changed[file] if file in changed else read(file)


def values(name: str, old: str, new: str, occurrence: int | None = 0, **rest: str) -> Mutant:
    """Return a mutant of one edit that wrong values must kill."""
    return _mutant("values", name, old, new, occurrence, **rest)


def checked(name: str, old: str, new: str, occurrence: int | None = 0, **rest: str) -> Mutant:
    """Return a mutant of one edit that the checked mode must kill."""
    return _mutant("checked", name, old, new, occurrence, **rest)


def static(name: str, old: str, new: str, occurrence: int | None = 0, **rest: str) -> Mutant:
    """Return a mutant of one edit that the static checks must kill."""
    return _mutant("static", name, old, new, occurrence, **rest)


def _mutant(
    check: str, name: str, old: str, new: str, occurrence: int | None, file: str = "", **rest: str
) -> Mutant:
    return Mutant(name, check, (Edit(old, new, occurrence, file),), **rest)


def load(folder: str | Path) -> dict[str, tuple[Mutant, ...]]:
    """Return the mutants of each kernel, by the name of its file in a folder.

    Each file `<kernel>.py` defines `MUTANTS`. Its edits without a file are edits of
    `<kernel>.metal`.
    """
    found = {}
    for path in sorted(Path(folder).glob("*.py")):
        mutants = runpy.run_path(str(path))["MUTANTS"]
        found[path.stem] = tuple(_with_file(mutant, f"{path.stem}.metal") for mutant in mutants)
    return found


def _with_file(mutant: Mutant, file: str) -> Mutant:
    edits = tuple(edit if edit.file else edit._replace(file=file) for edit in mutant.edits)
    return replace(mutant, edits=edits)


class Kill(NamedTuple):
    """The detection of a mutant.

    Attributes:
        check: the check that detected it, one of `CHECKS`.
        findings: the findings of that check; empty for `values`.
    """

    check: str
    findings: tuple[Finding, ...] = ()


def killed_by(mutant: Mutant, run: Run, static_check: StaticCheck | None = None) -> Kill | None:
    """Return the kill of a mutant, or None if it survives.

    The kernels that `run` makes must be made from the mutated sources. A `static` mutant is run in
    fast mode and then checked statically; any other mutant is run in checked mode.

    Args:
        mutant: the mutant that is in place.
        run: runs the kernel in a mode of `emulate` and asserts its values.
        static_check: the static checks; `check_launch` with its defaults if None.

    Raises:
        KernelError: the mutated source does not compile, which proves nothing.
    """
    is_static = mutant.check == "static"
    try:
        launches = run("fast" if is_static else "checked")
    except AssertionError:
        return Kill("values")
    except KernelError as error:
        if any("does not compile" in finding.message for finding in error.findings):
            raise
        return Kill("checked", error.findings)
    if not is_static:
        return None
    check = static_check or _default_static_check
    findings = tuple(finding for launch in launches for finding in check(launch))
    return Kill("static", findings) if findings else None


def require_killed(mutant: Mutant, run: Run, static_check: StaticCheck | None = None) -> None:
    """Raise an AssertionError unless the mutant is killed as expected.

    The arguments are those of `killed_by`.
    """
    kill = killed_by(mutant, run, static_check)
    if kill is None:
        raise AssertionError(f"mutant '{mutant.name}' survives, expected a kill by {mutant.check}")
    shown = "".join(f"\n  {finding}" for finding in kill.findings)
    if kill.check != mutant.check:
        raise AssertionError(
            f"mutant '{mutant.name}' is killed by {kill.check}, expected {mutant.check}{shown}"
        )
    if mutant.message and not any(_is_expected(mutant, finding) for finding in kill.findings):
        raise AssertionError(
            f"mutant '{mutant.name}': expected '{mutant.message}' at '{mutant.line}', found{shown}"
        )


def _is_expected(mutant: Mutant, finding: Finding) -> bool:
    at_line = mutant.line in finding.text if mutant.line else not finding.line
    return mutant.message in finding.message and at_line


def _default_static_check(launch: Launch) -> Sequence[Finding]:
    from .launch_check import check_launch

    return check_launch(launch).findings
