"""The convert command: arguments, what it prints, and how it fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.models import GOLDEN

from mlx_rgemma.convert import build_parser, main
from mlx_rgemma.io.hub import EMBEDDED

ROOT = Path(__file__).parent.parent


def run(*arguments: object, cwd: Path, module: bool = True) -> subprocess.CompletedProcess[str]:
    program = ["-m", "mlx_rgemma.convert"] if module else [str(ROOT / "convert.py")]
    return subprocess.run(
        [sys.executable, *program, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONWARNINGS": "default"},
        timeout=120,
    )


@pytest.mark.parametrize("module", [True, False], ids=["python -m", "convert.py"])
def test_converts(tmp_path, module):
    done = run("--hf-path", EMBEDDED, "-q", "--q-bits", 8, cwd=tmp_path, module=module)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr  # runpy's, above all
    assert "Writing: 100%" in done.stderr
    assert done.stdout.splitlines() == [
        "Wrote mlx_model: quantized (8 bits, groups of 64), the rest bfloat16.",
        "3.1 M parameters, 3.4 MB, 8.725 bits per weight",
    ]
    values = json.loads((tmp_path / "mlx_model" / "config.json").read_text())
    assert values["quantization"] == {"group_size": 64, "bits": 8, "mode": "affine"}


def test_reports_what_was_kept(tmp_path, capsys):
    arguments = ["--model", str(GOLDEN / "tiny-2b"), "--mlx-path", str(tmp_path / "out")]
    assert main([*arguments, "-q", "--q-group-size", "32"]) == 0
    printed = capsys.readouterr().out
    assert (
        "Not quantized (the group size does not divide the width): model.embed_tokens, " in printed
    )
    assert "and 22 more." in printed
    assert f"Note: There is no tokenizer in {GOLDEN / 'tiny-2b'}." in printed


FAILURES = {
    "missing folder": (["--hf-path", "absent"], "absent: no such folder"),
    "impossible bits": (["-q", "--q-bits", "7"], "q-bits is 7; with q-mode affine it must be"),
    "negative bits": (["-q", "--q-bits", "-4"], "q-bits is -4"),
    "impossible mode": (["-q", "--q-mode", "int4"], "q-mode is 'int4', expected one of affine"),
    "bits without -q": (
        ["--q-bits", "4"],
        "q-bits, q-group-size, q-mode and quant-predicate need -q",
    ),
    "both ways": (["-q", "-d"], "exclude each other"),
    "nothing to dequantize": (["-d"], "not quantized; leave out --dequantize"),
    "existing folder": (["--mlx-path", "."], "exists already"),
}


@pytest.mark.parametrize(("arguments", "message"), FAILURES.values(), ids=FAILURES)
def test_failures(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["--hf-path", str(EMBEDDED), *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and message in captured.err
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [[], ["--hf-path", "x", "--dtype", "int8"]], ids=str)
def test_wrong_usage(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("mlx_rgemma.convert: error: ") and error.count("\n") == 1


def test_flags_are_those_of_mlx_lm():
    flags = {flag for action in build_parser()._actions for flag in action.option_strings}
    assert {
        *("--hf-path", "--model", "--mlx-path", "-q", "--quantize", "--q-bits"),
        *(
            "--q-group-size",
            "--q-mode",
            "--dtype",
            "-d",
            "--dequantize",
            "--revision",
            "--quant-predicate",
        ),
    } <= flags


def test_help_is_quick(tmp_path):
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = run("--help", cwd=tmp_path)
        times.append(time.perf_counter() - start)
        assert done.returncode == 0 and "--q-group-size" in done.stdout
    assert min(times) < 0.4


def test_function_and_command_share_a_name():
    import mlx_rgemma
    import mlx_rgemma.convert as command

    assert callable(mlx_rgemma.convert) and mlx_rgemma.convert.__name__ == "convert"
    assert callable(command)
