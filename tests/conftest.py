"""Fixtures that all tests share, and markers by folder."""

from __future__ import annotations

import sys

import mlx_rgemma  # noqa: F401  (before NumPy: it sets how long OpenBLAS's threads wait)

# isort: split
import mlx.core as mx
import pytest
from helpers.assertions import ON_GPU
from helpers.models import MODELS

FOLDER_MARKERS = {"cpu": "cpu", "ops": "kernels", "metal-emulator": "kernels"}
"""Markers of all tests in a folder; other files name theirs as `pytestmark`."""

SKIPPED = {
    "cpu": (sys.platform == "linux" and not ON_GPU, "the CPU backend runs on Linux only"),
    "mac": (mx.metal.is_available(), "needs a Mac with Metal"),
}
"""Markers of tests that cannot run everywhere: whether they can here, and why not."""


@pytest.fixture(params=MODELS)
def model_name(request) -> str:
    return request.param


@pytest.fixture(autouse=True)
def cpu_backend(request):
    """Select the CPU backend for its tests, whatever the environment says."""
    from mlx_rgemma.ops import backend

    if request.path.parent.name != "cpu":
        yield
        return
    with backend.use(backend.Backend.CPU):
        yield


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """Return the names of the Numba kernels that run, with no lower limit on the size of arrays."""
    from mlx_rgemma.cpu import numba_runtime

    names: list[str] = []
    run = numba_runtime.run
    monkeypatch.setattr(numba_runtime, "MIN_ELEMENTS", 1)
    monkeypatch.setattr(
        numba_runtime, "run", lambda name, *rest: (names.append(name), run(name, *rest))
    )
    return names


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of tests/fuzz."""
    add = parser.getgroup("fuzz").addoption
    add("--fuzz-cases", type=int, default=400, help="Damaged cases of tests/fuzz.")
    add("--fuzz-seed", type=int, default=0, help="Seed of the damages.")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Add the markers of folders, skip what cannot run here, and begin with slow files."""
    for item in items:
        for folder, marker in FOLDER_MARKERS.items():
            if folder in item.path.relative_to(item.config.rootpath).parts:
                item.add_marker(marker)
        for marker, (runs, reason) in SKIPPED.items():
            if not runs and item.get_closest_marker(marker) is not None:
                item.add_marker(pytest.mark.skip(reason=reason))
    # Begun last, one of them would keep the other processes waiting.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
