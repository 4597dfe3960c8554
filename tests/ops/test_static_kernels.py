"""What Metal's compiler would say to the kernels, as far as that can be known without it."""

from __future__ import annotations

import pytest
from helpers.emulated import executed, needs_compiler
from metal_cpu import check_launch
from planted_bugs import BUGS

from mlx_rgemma import ops  # noqa: F401  (importing them registers the kernels)
from mlx_rgemma.ops import kernels

# Those of the scan, the RG-LRU and the convolution.
VARIANTS = [
    pytest.param(kernel, variant, id=f"{kernel.name} {kernels.words(variant)}")
    for kernel in kernels.registered()
    if kernel.name in BUGS
    for variant in kernel.variants
]


@needs_compiler
@pytest.mark.parametrize("kernel, variant", VARIANTS)
def test_source_is_legal(kernel, variant):
    """With the example's arrays, and with tiny ones, which lie in another address space."""
    with executed() as launches:
        kernel.launch(*kernel.example(*variant))
    for launch in launches:
        check_launch(launch, portable=True).require(launch.name)
