"""Shared fixtures: the golden models, and how close is close enough."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import mlx_rgemma  # noqa: F401  (first: it finds MLX a fast BLAS on Linux)

# isort: split
import mlx.core as mx
import numpy as np
import pytest

GOLDEN = Path(__file__).parent / "golden"
MODELS = ("tiny-2b", "tiny-9b", "tiny-sharded")

ON_GPU = mx.default_device() == mx.Device(mx.gpu)
"""On a Mac the same tests run on its GPU, with the kernels where they agree."""

LOGITS_ATOL = 2e-4 if ON_GPU else 5e-5
"""float32 logits against Google's code, which is itself within 1.4e-5 of float64. A GPU may
multiply float32 matrices in reduced precision."""


def tolerance(on_cpu: float) -> float:
    """A relative tolerance of float32 results; looser on a GPU, for the same reason."""
    return max(on_cpu, 1e-3) if ON_GPU else on_cpu


def golden(name: str) -> dict[str, np.ndarray]:
    """The arrays of one golden file."""
    with np.load(GOLDEN / name) as arrays:
        return {key: arrays[key] for key in arrays.files}


@cache
def golden_weights(name: str) -> dict[str, mx.array]:
    """A golden checkpoint's tensors as they lie on disk."""
    weights: dict[str, mx.array] = {}
    for file in sorted((GOLDEN / name).glob("*.safetensors")):
        weights.update(mx.load(str(file)))
    return weights


def golden_model(name: str, dtype: mx.Dtype = mx.float32, *, fuse: bool = True, **changes):
    """A golden checkpoint as a model, with changed keys of its config; fused as `load` does."""
    from mlx_rgemma import GriffinConfig, Model

    values = json.loads((GOLDEN / name / "config.json").read_text())
    model = Model(GriffinConfig.from_dict({**values, **changes}))
    weights = model.sanitize(golden_weights(name))
    kept = [(k, v.astype(dtype)) for k, v in weights.items() if _belongs(model, k)]
    model.load_weights(kept)
    mx.eval(model.parameters())
    if fuse:
        model.fuse_projections()
    return model


def _belongs(model, name: str) -> bool:
    """Whether a tensor belongs to a model that may have been cut short."""
    parts = name.split(".")
    return parts[1] != "layers" or int(parts[2]) < len(model.layers)


@pytest.fixture(params=MODELS)
def model_name(request) -> str:
    return request.param


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """The names of the compiled loops that run, each time; any array is large enough for one."""
    from mlx_rgemma.ops import loops

    names: list[str] = []
    run = loops.run
    monkeypatch.setattr(loops, "LEAST", 1)
    monkeypatch.setattr(loops, "run", lambda name, *rest: (names.append(name), run(name, *rest)))
    return names


def max_error(actual: mx.array | np.ndarray, expected: np.ndarray) -> float:
    """Largest absolute difference."""
    return float(np.abs(np.array(actual, dtype=np.float64) - expected).max())


def relative_error(actual: mx.array | np.ndarray, expected: np.ndarray) -> float:
    """Largest difference relative to the largest expected value."""
    scale = float(np.abs(expected).max())
    return max_error(actual, expected) / (scale if scale > 0 else 1.0)


LONGEST = (
    "test_fuzz_requests.py",
    "test_fuzz_flags.py",
    "test_fuzz_archives.py",
    "test_fuzz_tokenizers.py",
    "test_fuzz_training.py",
    "test_launch.py",
    "test_speculation.py",
    "test_planted_bugs_blocks.py",
    "test_session_walks.py",
    "test_finetuning.py",
    "test_benchmark_command.py",
    "test_generate_command.py",
    "test_server.py",
    "test_chat.py",
)
"""Files that take longest, the longest first: begun last, one would keep the rest waiting."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of tests/fuzz."""
    add = parser.getgroup("fuzz").addoption
    add("--fuzz-cases", type=int, default=400, help="Damaged cases of tests/fuzz.")
    add("--fuzz-seed", type=int, default=0, help="Seed of the damages.")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest.

    Without a C++ compiler there is nothing to test of the tool that compiles kernels: say so.
    """
    import metal_cpu

    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))

    compiler, reason = metal_cpu.compiler()
    if compiler is None:
        skip = pytest.mark.skip(reason=f"kernels not compiled: {reason}")
        for item in items:
            if item.path.parent.name == "metal_cpu_selftest":
                item.add_marker(skip)
