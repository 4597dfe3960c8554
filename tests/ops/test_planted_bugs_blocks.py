"""Bugs in the attention, decode step and norm kernels are found; in the kernels as they are, none.

Each planted bug says which tier finds it: wrong numbers, the checked mode, or the static checks.
"""

from __future__ import annotations

import planted_bugs_attention
import planted_bugs_norm
import planted_bugs_step
import pytest
from helpers.emulated import executed, needs_compiler
from planting import Bug, finder, static_findings

from mlx_rgemma.ops import kernels

pytestmark = needs_compiler

MODULES = (planted_bugs_attention, planted_bugs_step, planted_bugs_norm)
CHECKS = {bug.file: module.check for module in MODULES for bug in module.BUGS}
BUGS = [bug for module in MODULES for bug in module.BUGS]
SOUND = [kernel for kernel in kernels.registered() if kernel.file in CHECKS]


def test_bugs_are_planted_in_every_kernel():
    assert {bug.file for bug in BUGS} == {kernel.file for kernel in SOUND}
    assert len({(bug.file, bug.name) for bug in BUGS}) == len(BUGS) >= 40


@pytest.mark.parametrize("file", CHECKS)
def test_nothing_is_found_in_a_sound_kernel(file):
    CHECKS[file](file, "checked")


# Of the head sizes, the one of the released models.
VARIANTS = [
    pytest.param(kernel, variant, id=f"{kernel.name} {kernels.words(variant)}")
    for kernel in SOUND
    for variant in kernel.variants
    if 16 not in variant
]


@pytest.mark.parametrize(("kernel", "variant"), VARIANTS)
def test_a_sound_kernel_passes_the_static_checks(kernel, variant):
    with executed() as launches:
        kernel.launch(*kernel.example(*variant))
    assert static_findings(launches[0]) == ()


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: f"{bug.file}: {bug.name}")
def test_bug_is_found(bug: Bug):
    assert finder(bug, CHECKS[bug.file]) == bug.by
