"""Every mutant of every kernel is killed, and the kernels themselves pass the same runs."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
from helpers.emulated import needs_compiler
from helpers.kernel_runs import KERNELS, RUNS, static_findings
from metal_emulator import mutation

from mlx_rgemma.ops import metal

pytestmark = [needs_compiler, pytest.mark.slow]

MUTANTS = mutation.load(Path(__file__).parent / "mutants")
PARAMETERS = [
    pytest.param(kernel, mutant, id=f"{kernel}: {mutant.name}")
    for kernel, mutants in MUTANTS.items()
    for mutant in mutants
]
CASES = sorted({(kernel, mutant.case) for kernel, list_ in MUTANTS.items() for mutant in list_})


@pytest.fixture(autouse=True)
def built_anew():
    """Build the kernels from the sources of this test only."""
    metal.reset()
    yield
    metal.reset()


def test_every_kernel_has_mutants():
    assert MUTANTS.keys() == KERNELS.keys() == RUNS.keys()
    assert len({parameter.id for parameter in PARAMETERS}) == len(PARAMETERS)
    assert all(len(mutants) >= 5 for mutants in MUTANTS.values())


@pytest.mark.parametrize(("kernel", "case"), CASES)
def test_the_kernel_itself_passes(kernel, case):
    RUNS[kernel](kernel, "checked", case)


@pytest.mark.parametrize(("kernel", "mutant"), PARAMETERS)
def test_mutant_is_killed(kernel: str, mutant: mutation.Mutant):
    with mock.patch.object(metal, "source", mutant.apply(metal.source)):
        mutation.require_killed(
            mutant, lambda mode: RUNS[kernel](kernel, mode, mutant.case), static_findings
        )
