"""The static checks of the emulator find no defect in any variant of any kernel."""

from __future__ import annotations

import pytest
from helpers.emulated import emulated, needs_compiler
from helpers.kernel_runs import KERNELS, static_findings

from mlx_rgemma.ops import metal

# Of the head sizes, the one of the released models.
VARIANTS = [
    pytest.param(kernel, variant, id=f"{kernel.name} {metal.format_variant(variant)}")
    for kernel in KERNELS.values()
    for variant in kernel.variants
    if 16 not in variant
]


@needs_compiler
@pytest.mark.parametrize("kernel, variant", VARIANTS)
def test_source_is_legal(kernel, variant):
    """Check with the sample inputs, with tiny ones and with large ones."""
    with emulated() as launches:
        kernel.launch(*kernel.sample_inputs(*variant))
    assert launches
    assert [static_findings(launch) for launch in launches] == [()] * len(launches)
