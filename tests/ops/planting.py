"""Bugs planted into the kernels' sources, and what finds them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple
from unittest import mock

import metal_cpu

from mlx_rgemma.ops import kernels


class Bug(NamedTuple):
    """One edit of a kernel's source.

    Attributes:
        name: What is wrong.
        by: What finds it: wrong ``numbers``, the ``checked`` mode, which sees races, stray
            accesses and unwritten outputs, or the ``static`` checks.
        file: Of ``metal/``.
        old, new: The text that is replaced, and by what.
        place: Which of its places, 0 the first; all of them when None.
    """

    name: str
    by: str
    file: str
    old: str
    new: str
    place: int | None = 0

    def edit(self, text: str) -> str:
        """The source with the bug in it."""
        parts = text.split(self.old)
        if self.place is None:
            assert len(parts) > 1, f"'{self.old}' does not occur in {self.file}"
            return self.new.join(parts)
        before = self.place + 1
        assert len(parts) > before, f"'{self.old}' occurs {len(parts) - 1} times in {self.file}"
        return self.old.join(parts[:before]) + self.new + self.old.join(parts[before:])


@contextlib.contextmanager
def planted(bug: Bug) -> Iterator[None]:
    """Within it the kernels are built from the sources with the bug."""
    original = kernels.source

    def source(file: str) -> str:
        text = original(file)
        return bug.edit(text) if file == bug.file else text

    with mock.patch.object(kernels, "source", source):
        kernels.forget()
        try:
            yield
        finally:
            kernels.forget()


Check = Callable[[str, str], list[metal_cpu.Launch]]
"""Runs the kernel of a file, in a mode of `executed`, and asserts its numbers."""


def finder(bug: Bug, check: Check) -> str | None:
    """What finds the bug, as in `Bug.by`; None when nothing does."""
    with planted(bug):
        if bug.by == "static":
            return "static" if static_findings(check(bug.file, "fast")[0]) else None
        try:
            check(bug.file, "checked")
        except metal_cpu.KernelError as error:
            # A slip in the edit itself proves nothing.
            assert "does not compile" not in str(error), error
            return "checked"
        except AssertionError:
            return "numbers"
    return None


_HEADS = ("q", "k", "v", "kv", "ring")
NEVER_TINY = {"windowed_attention": _HEADS, "ring_attention": _HEADS, "rotary": _HEADS}
"""Inputs that never lie in the memory for tiny arrays: a head has 8 channels or more."""


def static_findings(launch: metal_cpu.Launch) -> tuple[metal_cpu.Finding, ...]:
    """What the static checks find in a kernel that was launched."""
    never_tiny = NEVER_TINY.get(launch.name.removeprefix("mlx_rgemma_"), ())
    return metal_cpu.check_launch(launch, portable=True, never_tiny=never_tiny).findings
