"""The golden data of the operations once more, with their kernels executed from Metal source."""

from __future__ import annotations

import pytest
from helpers.emulated import emulated, launched, needs_compiler
from test_golden_ops import test_causal_conv1d, test_linear_scan, test_rg_lru

pytestmark = needs_compiler

# Collected here under a fixture of this module; their own module runs them without kernels.
__all__ = ["test_causal_conv1d", "test_linear_scan", "test_rg_lru"]


@pytest.fixture(autouse=True)
def kernels_are_executed(request):
    with emulated() as launches:
        yield
    operation = request.function.__name__.removeprefix("test_")
    assert set(launched(launches)) >= {operation}
