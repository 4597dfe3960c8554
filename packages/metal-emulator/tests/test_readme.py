"""The Python examples of the README run as printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import metal_emulator
import pytest
from requirements import needs_compiler

pytestmark = needs_compiler

README = Path(__file__).parents[1] / "README.md"
PACKAGE = Path(metal_emulator.__file__).resolve().parents[1]
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README.read_text(), flags=re.M | re.S)

# The modules that the README leaves to the reader.
MY_KERNELS = """
import types
import metal_emulator
import mlx.core as mx

SOURCE = {source!r}
sources = types.SimpleNamespace(read=lambda file: SOURCE)


def run_kernels():
    x = mx.linspace(-0.9, 3, 96)
    kernel = mx.fast.metal_kernel(
        name="softsign", input_names=["x"], output_names=["y"],
        source=sources.read("softsign.metal"),
    )
    (y,) = kernel(
        inputs=[x], output_shapes=[x.shape], output_dtypes=[x.dtype],
        grid=(96, 1, 1), threadgroup=(32, 1, 1),
    )
    assert mx.allclose(y, x * mx.rsqrt(x * x + 1))


def run_softsign(mode):
    launches = []
    with metal_emulator.emulate(mode, record=launches):
        run_kernels()
    return launches
"""


def block_with(text: str) -> str:
    """Return the only block that contains a text."""
    (block,) = [block for block in BLOCKS if text in block]
    return block


def python(folder: Path, *arguments: str) -> str:
    """Run Python in a folder, and return its output."""
    path = os.pathsep.join([str(PACKAGE), str(folder)])
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def project(tmp_path):
    """Return a folder with the modules and mutants that the examples import."""
    source = re.search(r'source = """(.*?)"""', BLOCKS[0], re.S)
    (tmp_path / "my_kernels.py").write_text(MY_KERNELS.format(source=source.group(1)))
    (tmp_path / "mutants").mkdir()
    (tmp_path / "mutants" / "softsign.py").write_text(block_with("MUTANTS = ["))
    return tmp_path


@pytest.mark.parametrize("number", [0, 1], ids=["mlx", "source file"])
def test_the_first_examples_run(number, tmp_path):
    python(tmp_path, "-c", BLOCKS[number])


def test_the_mutants_of_the_example_are_killed(project):
    (project / "test_my_mutants.py").write_text(block_with("require_killed(mutant"))
    assert "3 passed" in python(project, "-m", "pytest", "-q", "-p", "no:cacheprovider")


def test_the_example_records_launches(project):
    python(project, "-c", block_with("save_launches"))
    (launch,) = metal_emulator.load_launches(project / "kernels")
    assert launch.has_values


def test_every_example_is_tested():
    assert len(BLOCKS) == 5
