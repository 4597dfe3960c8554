"""The selftest command: what it prints, and how it exits."""

from __future__ import annotations

import json
import subprocess
import sys

import mlx.core as mx
import pytest
from helpers.emulated import emulated, needs_compiler

from mlx_rgemma import selftest
from mlx_rgemma.ops import metal

needs_no_metal = pytest.mark.skipif(mx.metal.is_available(), reason="this machine has Metal")


@pytest.fixture(autouse=True)
def built_anew():
    metal.reset()
    yield
    metal.reset()


@needs_no_metal
def test_without_metal_it_says_so_and_succeeds(capsys):
    assert selftest.main([]) == 0
    out = capsys.readouterr().out
    assert "kernels not run: no Metal on this machine" in out
    for kernel in metal.registered():
        assert kernel.name in out


@needs_no_metal
def test_without_metal_json_has_the_reason(capsys):
    assert selftest.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["not_run"] == "no Metal on this machine"
    assert "rg_lru" in found["kernels"]


@needs_compiler
def test_kernels_are_compared_and_timed(capsys):
    with emulated(validate=True):
        command = ["--kernel", "rg_lru", "rms_norm", "--timing", "example", "--repeat", "1"]
        assert selftest.main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("mlx_rgemma ")
    assert lines[1].split() == [
        *("kernel", "variant", "shape", "error", "allowed"),
        *("kernel", "ms", "reference", "ms", "state"),
    ]
    rows = [line for line in lines[2:] if line.startswith(("rg_lru ", "rms_norm "))]
    assert len(rows) == len(lines) - 2 == 6
    shapes = {"rg_lru": "2x150x35", "rms_norm": "2x4093"}
    for row in rows:
        assert row.endswith("passed") and shapes[row.split()[0]] in row and " - " not in row


@needs_compiler
@pytest.mark.parametrize(
    "old, new, reason",
    [("all *= a;", "", "y is off by"), ("float h =", "float h", "does not compile")],
    ids=["wrong", "illegal"],
)
def test_a_kernel_that_fails_makes_it_fail(capsys, monkeypatch, old, new, reason):
    original = metal.source
    monkeypatch.setattr(metal, "source", lambda file: original(file).replace(old, new))
    with emulated(validate=True):
        assert selftest.main(["--kernel", "rg_lru", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["not_run"] is None
    assert {row["state"] for row in found["kernels"]} == {"off"}
    assert all(reason in row["reason"] for row in found["kernels"])


def test_an_unknown_kernel_is_named(capsys):
    assert selftest.main(["--kernel", "flash"]) == 1
    assert "--kernel: found 'flash', expected one of" in capsys.readouterr().err


def test_it_runs_as_a_module():
    command = [sys.executable, "-W", "error", "-m", "mlx_rgemma.selftest"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "mlx_rgemma" in result.stdout
    assert not result.stderr


@pytest.mark.mac
def test_every_kernel_passes_on_this_mac(capsys):
    assert selftest.main(["--timing", "none", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["state"] for row in found["kernels"]} == {"passed"}
