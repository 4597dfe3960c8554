"""The static checks of the emulator find no defect in any variant of any kernel."""

from __future__ import annotations

import pytest
from executing import executed, needs_compiler
from kernel_runs import KERNELS, static_findings

from mlx_rgemma.ops import kernels

# Of the head sizes, the one of the released models.
VARIANTS = [
    pytest.param(kernel, variant, id=f"{kernel.name} {kernels.words(variant)}")
    for kernel in KERNELS.values()
    for variant in kernel.variants
    if 16 not in variant
]


@needs_compiler
@pytest.mark.parametrize("kernel, variant", VARIANTS)
def test_source_is_legal(kernel, variant):
    """Check with the inputs of the example, with tiny ones and with large ones."""
    with executed() as launches:
        kernel.launch(*kernel.example(*variant))
    assert launches
    assert [static_findings(launch) for launch in launches] == [()] * len(launches)
