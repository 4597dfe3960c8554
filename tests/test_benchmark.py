"""The command benchmark: figures, tables, refusals."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest

from mlx_rgemma import Model, convert
from mlx_rgemma.benchmark import MOVED, main
from mlx_rgemma.griffin.cache import state_nbytes
from mlx_rgemma.griffin.config import SHAPES
from mlx_rgemma.io.hub import EMBEDDED

TINY = SHAPES["micro"]


@pytest.fixture(autouse=True)
def bandwidth(monkeypatch):
    """A bandwidth of 1 GB/s, whose measurement takes a second."""
    monkeypatch.setattr("mlx_rgemma.evaluation.machine.copy_bandwidth", lambda: 1e9)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The JSON object of one run of all cases."""
    file = tmp_path_factory.mktemp("benchmark") / "figures.json"
    command = "--shape micro -p 16,24 -g 4 -n 2 -b 1,2 -t 8 --after 5 -q none,8 --dtype float32"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlx_rgemma.evaluation.machine.copy_bandwidth", lambda: 1e9)
        command += " --fine-tune-type lora"
        assert main([*command.split(), "--json", "--output", str(file)]) == 0
    return json.loads(file.read_text())


def test_every_case_is_measured(report):
    for label in ("none", "8"):
        found = [r for r in report["results"] if r["quantization"] == label]
        prompts = [("prompt", n, b) for n in (16, 24) for b in (1, 2)]
        training = [("training", 8, b) for b in (1, 2)]
        cases = [(r["kind"], r["length"], r["batch_size"]) for r in found]
        assert cases == [*prompts, ("after", 5, 1), *training]


def test_figures_follow_from_the_times(report):
    state = state_nbytes(Model(TINY).make_cache())
    for result in report["results"]:
        kind, batch = result["kind"], result["batch_size"]
        figure = {"prompt": "prompt_tps", "after": "generation_tps", "training": "training_tps"}
        spread = result[figure[kind]]
        assert len(spread["values"]) == (6 if kind == "after" else 2)
        assert 0 < spread["low"] <= spread["median"] <= spread["high"]
        if kind == "training":
            seconds, tokens = result["total_time"]["values"], 8 * batch
        elif kind == "prompt":
            seconds, tokens = result["first_token_s"]["values"], result["length"] * batch
        else:
            continue
        for tps, taken in zip(spread["values"], seconds, strict=True):
            assert tps * taken == pytest.approx(tokens)
    for result in report["results"]:
        if result["kind"] != "training":
            assert result["state_bytes"] == state * result["batch_size"]
            assert result["peak_memory"]["low"] * 1e9 > result["weight_bytes"]
    plain = next(r for r in report["results"] if r["kind"] == "after")
    read = plain["weight_bytes"] + plain["state_bytes"]
    speed = plain["generation_tps"]["median"]
    assert plain["bandwidth_share"] == pytest.approx(speed * read / 1e9)


def test_quantized_weights_are_fewer_bytes(report):
    sizes = {r["quantization"]: r["weight_bytes"] for r in report["results"]}
    assert sizes["8"] < sizes["none"] / 3


def test_the_printed_report_names_the_machine_and_ends_with_tables(capsys):
    assert (
        main(["--shape", "micro", "-p", "8", "-g", "2", "-n", "1", "--warmup", "0", "-t", "4"]) == 0
    )
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("Machine: ")
    products = "MLX" if mx.default_device() == mx.Device(mx.gpu) else "in NumPy"
    assert "matrix products: " in printed[2] and products in printed[2]
    assert printed[3] == "Model: micro, random weights"
    assert any(line.startswith("Trial 1:  prompt 8: prompt_tps=") for line in printed)
    tables = [line for line in printed if line.startswith("| ")]
    assert len(tables) == 6 and tables[0].startswith("| dtype   | quantization | batch | prompt |")
    assert "training tokens/s" in tables[3]


def test_quick_is_short(capsys):
    assert main(["--quick", "--warmup", "0", "--json"]) == 0
    captured = capsys.readouterr()
    (result,) = json.loads(captured.out)["results"]
    assert result["length"] == 128 and len(result["prompt_tps"]["values"]) == 2
    assert captured.err.count("Trial ") == 2


BAD = {
    "two models": ("--model x --shape micro", "found both, expected one"),
    "no such model": ("--model /nope", "/nope: no such folder"),
    "no such quantization": (
        "--shape micro -q 9",
        "--quantize: found '9', expected one of none, 2",
    ),
    "no folder": ("--shape micro --output /nope/x.json", "there is no folder /nope"),
    "no file": ("--shape micro --output /", "a folder, expected the name of a file"),
    "training of quantized weights": (
        "--shape micro -q 4 -p 4 -g 2 -n 1 -t 4",
        "trains quantized weights with LoRA only",
    ),
}


@pytest.mark.parametrize(("command", "message"), BAD.values(), ids=BAD)
def test_mistakes_are_one_line(capsys, command, message):
    assert main(command.split()) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("-p 1,x", "invalid integer value"),
        ("-p 0", "0 is not at least 1"),
        ("--dtype int8", "'int8' is none of float32"),
        *((flag, f"{flag} is a flag of python -m {module}") for flag, module in MOVED.items()),
        ("--compare mlx-lm", "in a clone of the repository"),
    ],
)
def test_bad_arguments(capsys, command, message):
    with pytest.raises(SystemExit) as exit:
        main(command.split())
    error = capsys.readouterr().err
    assert exit.value.code == 2 and message in error and error.count("\n") == 1


@pytest.mark.parametrize("module", sorted(set(MOVED.values())))
def test_moved_flags_name_modules_that_exist(module):
    import importlib

    assert callable(importlib.import_module(module).main)


def test_a_quantized_model_is_not_quantized_again(capsys, tmp_path):
    convert(EMBEDDED, tmp_path / "q4", quantize=True, q_bits=4)
    command = ["--model", str(tmp_path / "q4"), "-p", "4", "-g", "2", "-n", "1", "-q", "8"]
    assert main(command) == 1
    assert "the model is quantized already" in capsys.readouterr().err
