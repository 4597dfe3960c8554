"""Without a C++ compiler there is nothing to test here: say so."""

from __future__ import annotations

from pathlib import Path

import metal_cpu
import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    compiler, reason = metal_cpu.compiler()
    if compiler is None:
        skip = pytest.mark.skip(reason=f"kernels not compiled: {reason}")
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(skip)
