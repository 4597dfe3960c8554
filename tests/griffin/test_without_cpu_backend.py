"""The model without the CPU backend: it may be deleted, and other platforms never load it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

BLOCKED = """
import sys

# As if the folder mlx_rgemma/cpu were deleted, or Numba not installed.
for name in {names!r}:
    sys.modules[name] = None

import pytest
from mlx_rgemma.ops import backend

class Backend:
    def pytest_sessionfinish(self):
        assert backend.active() is backend.Backend.{active}
        for name in {names!r}:
            assert sys.modules[name] is None
            assert not any(found.startswith(name + ".") for found in sys.modules)

arguments = ["-n", "0", "-q", "-p", "no:cacheprovider", "--no-header", *{arguments!r}]
sys.exit(pytest.main(arguments, plugins=[Backend()]))
"""

GOLDEN_TESTS = (
    "test_full_pass",
    "test_any_chunking",
    "test_decode_after_prefill",
    "test_ragged_batch",
    "test_packed_documents",
    "test_packed_golden_logits",
    "test_greedy_tokens_are_identical",
    "test_loss_and_gradients",
)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing loads the CPU backend")
@pytest.mark.parametrize(
    ("names", "active"),
    [(("mlx_rgemma.cpu", "numba", "llvmlite"), "MLX"), (("numba", "llvmlite"), "CPU")],
    ids=["no CPU backend", "no Numba"],
)
def test_golden_results_without(names, active):
    """Full pass, chunks, steps, ragged and packed batches, and the gradient of training."""
    tests = [f"{HERE / 'test_golden.py'}::{name}" for name in GOLDEN_TESTS]
    code = BLOCKED.format(names=names, active=active, arguments=tests)
    out = run(code)
    assert out.returncode == 0, out.stdout[-3000:] + out.stderr[-3000:]
    assert " passed" in out.stdout
    assert "skipped" not in out.stdout and "deselected" not in out.stdout


DARWIN = """
import os, sys

# The dependencies have hooks of their own.
import json, mlx.core as mx, mlx.nn, numpy, threading
hooks = []
os.register_at_fork = lambda **functions: hooks.append(functions)
finders, path_hooks = list(sys.meta_path), list(sys.path_hooks)
sys.platform = "darwin"

import mlx_rgemma
from mlx_rgemma import GriffinConfig, Model

config = GriffinConfig.from_dict(json.load(open(sys.argv[1])))
model = Model(config)
cache = model.make_cache()
mx.eval(model(mx.array([[5, 6, 7]]), cache=cache), model(mx.array([[8]]), cache=cache))
loss = lambda model: model(mx.array([[5, 6, 7]])).sum()
mx.eval(mlx.nn.value_and_grad(model, loss)(model))

loaded = sorted(m for m in sys.modules if m.startswith(("mlx_rgemma.cpu", "numba", "llvmlite")))
assert not loaded, loaded
assert not hooks, hooks
assert sys.meta_path == finders and sys.path_hooks == path_hooks
assert mlx_rgemma.ops.backend.active() is mlx_rgemma.ops.backend.Backend.MLX
"""


def test_on_a_mac_nothing_of_the_cpu_backend_is_loaded():
    """No module, no hook for forks, no hook for imports: after imports, a pass and a gradient."""
    out = run(DARWIN, str(HERE.parent / "golden" / "tiny-2b" / "config.json"))
    assert out.returncode == 0, out.stderr


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own, on the default backend."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLX_RGEMMA")}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=HERE.parents[1],
        timeout=500,
        check=False,
    )
