"""Fixtures of the fuzz tests: one harness per test process, and how many cases there are."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fuzz.families import FAMILIES
from fuzz.harness import Harness, all_cases, shares
from fuzz.sources import sources


@pytest.fixture(scope="session")
def harness(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator:
    """A harness; the sound files are made once for all test processes."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if hasattr(request.config, "workerinput") else base
    made = Harness(sources(Path(shared, "fuzz-sources")), request.config.getoption("fuzz_seed"))
    yield made
    made.close()


@pytest.fixture
def fuzz(harness: Harness, request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Run a family's cases and fail with all that failed."""

    def run(name: str) -> None:
        family = FAMILIES[name]
        if family.needs and importlib.util.find_spec(family.needs) is None:
            pytest.skip(f"{name}: needs {family.needs}")
        count = shares(request.config.getoption("fuzz_cases"))[name]
        failed = [r for r in harness.run(family, all_cases(family, count)) if r.result.failure]
        told = "\n".join(map(str, failed))
        assert not failed, (
            f"{len(failed)} cases failed; replay with python tests/fuzz/run.py"
            f" --seed {harness.seed} --only FAMILY:CASE\n{told}"
        )

    return run
