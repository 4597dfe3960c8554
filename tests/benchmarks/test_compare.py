"""benchmarks.compare: cases, figures, tables, refusals."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

from benchmarks.compare import main
from mlx_rgemma import Model
from mlx_rgemma.evaluation.launch_count import count_model, small_model
from mlx_rgemma.evaluation.random_model import SHAPES
from mlx_rgemma.griffin.cache import state_nbytes

pytestmark = pytest.mark.slow

TINY = SHAPES["micro"]


@pytest.fixture(scope="module")
def answer(tmp_path_factory):
    """JSON and output of one run of all cases, beside mlx-lm."""
    file = tmp_path_factory.mktemp("benchmark") / "figures.json"
    command = (
        "-m benchmarks.compare --shape micro -p 16,24 -g 4 -n 2 -b 1,2 -t 8 --after 5,9"
        " -q none,4 --compare mlx-lm --dtype float32 --json"
    )
    result = subprocess.run(
        [sys.executable, *command.split(), "--output", str(file)],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert json.loads(file.read_text()) == json.loads(result.stdout)
    return json.loads(result.stdout), result.stderr


def pick(answer, **wanted):
    return [r for r in answer[0]["results"] if all(r[k] == v for k, v in wanted.items())]


def test_every_case_is_measured_by_both_engines(answer):
    for engine in ("mlx_rgemma", "mlx-lm"):
        for bits in ("none", "4"):
            found = pick(answer, engine=engine, quantization=bits)
            kinds = [(r["kind"], r["length"], r["batch_size"]) for r in found]
            texts = [("generate", n, b) for n in (16, 24) for b in (1, 2)]
            trained = [("train", 8, b) for b in (1, 2)] if bits == "none" else []
            assert kinds == [*texts, ("after", 5, 1), ("after", 9, 1), *trained]


def test_spreads_hold_every_trial(answer):
    for result in answer[0]["results"]:
        figure = {"generate": "prompt_tps", "after": "generation_tps", "train": "training_tps"}
        spread = result[figure[result["kind"]]]
        assert len(spread["values"]) == (6 if result["kind"] == "after" else 2)
        assert 0 < spread["low"] <= spread["median"] <= spread["high"]
    (first, *_) = pick(answer, kind="generate", engine="mlx_rgemma")
    for tps, seconds in zip(
        first["prompt_tps"]["values"], first["first_token_s"]["values"], strict=True
    ):
        assert tps * seconds == pytest.approx(16)


def test_bytes_and_launches(answer):
    state = state_nbytes(Model(TINY).make_cache())
    values = answer[0]["model"]["parameters"]
    for result in pick(answer, engine="mlx_rgemma", kind="generate", quantization="none"):
        assert result["weight_bytes"] == 4 * values
        assert result["state_bytes"] == state * result["batch_size"]
        assert result["bytes_per_step"] == result["weight_bytes"] + result["state_bytes"]
        assert result["peak_memory_gb"] * 1e9 > result["bytes_per_step"]
        assert result["process_peak_gb"] > result["peak_memory_gb"]
        assert result["bandwidth_share"] > 0
    for result in pick(answer, engine="mlx_rgemma", kind="after", quantization="none"):
        assert result["state_bytes"] == state  # whatever was read before
    counted = small_model(TINY.num_hidden_layers, TINY.block_types)
    for engine, theirs in (("mlx_rgemma", False), ("mlx-lm", True)):
        launches = {r["launches_per_step"] for r in pick(answer, engine=engine, kind="after")}
        assert launches == {count_model(counted, 1, theirs=theirs).total}


def test_quantized_weights_are_fewer_bytes_and_the_same_in_both_engines(answer):
    sizes = {
        (r["engine"], r["quantization"]): r["weight_bytes"] for r in pick(answer, kind="generate")
    }
    assert sizes["mlx_rgemma", "4"] < sizes["mlx_rgemma", "none"] / 3
    for bits in ("none", "4"):
        assert sizes["mlx_rgemma", bits] == sizes["mlx-lm", bits]


def test_ratios_and_flatness_follow_from_the_medians(answer):
    values = answer[0]
    assert len(values["ratios"]) == 2 * (2 * 4 + 2) + 2
    for ratio in values["ratios"]:
        where = {k: ratio[k] for k in ("dtype", "quantization", "kind", "length", "batch_size")}
        ours, theirs = (
            pick(answer, engine=engine, **where)[0][ratio["figure"]]["median"]
            for engine in ("mlx_rgemma", "mlx-lm")
        )
        assert ratio["baseline"] == "mlx-lm" and ratio["ratio"] == pytest.approx(ours / theirs)
    assert len(values["flatness"]) == 2 * 2 * (2 + 1)
    assert {(f["short"], f["long"]) for f in values["flatness"]} == {(16, 24), (5, 9)}


def test_what_cannot_be_measured_is_noted_once(answer):
    notes = [note for note in answer[0]["notes"] if "busy" not in note]
    assert len(notes) == len(set(notes)) == 4  # two engines, two batch sizes
    assert all("trains quantized weights with LoRA only" in note for note in notes)
    assert all(", quantization 4: left out; it " in note for note in notes)


def test_the_machine_and_the_packages_are_named(answer):
    machine, said = answer[0]["machine"], answer[1]
    assert machine["packages"]["mlx"] == importlib.metadata.version("mlx")
    assert machine["memory_bytes"] > 1e8 and machine["cores"] >= 1
    assert f"{machine['cpu']}, {machine['cores']} cores" in said
    assert f"matrix products: {machine['products']}" in said and "kernels: " in said
    assert answer[0]["baselines"]["mlx-lm"]["products"] in said
    assert "Model: micro, random weights, 0.2 million parameters" in said
    assert said.count("Trial 1:") == said.count("Trial 2:") == len(answer[0]["results"])


def test_tables_are_printed(capsys, monkeypatch):
    monkeypatch.setattr("os.getloadavg", lambda: (99.0, 0.0, 0.0))
    command = "--shape micro -p 8 -g 2 -n 1 --warmup 0 -t 4 --fine-tune-type lora"
    assert main(command.split()) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("Machine: ")
    assert any(line.startswith("Trial 1:  prompt 8: prompt_tps=") for line in printed)
    tables = [line for line in printed if line.startswith("| ")]
    assert len(tables) == 6 and tables[0].startswith("| engine     | dtype   | prompt |")
    assert "training tokens/s (lora)" in tables[3]
    assert any("GB/s" in line for line in printed)
    assert (
        printed[-1] == "Note: the machine was busy at the start (load 99.0): do not trust speeds."
    )


BAD = {
    "two models": ("--model x --shape micro", "found both, expected one"),
    "no such model": ("--model /nope", "/nope: no such folder"),
    "no such quantization": (
        "--shape micro -q 9",
        "--quantize: found '9', expected one of none, 2",
    ),
    "no picture": ("--shape micro --plot x.jpg", "x.jpg: a picture is one of .svg"),
    "no folder": ("--shape micro --output /nope/x.json", "there is no folder /nope"),
    "no file": ("--shape micro --output /", "a folder, expected the name of a file"),
}


@pytest.mark.parametrize(("command", "message"), BAD.values(), ids=BAD)
def test_mistakes_are_one_line(capsys, command, message):
    assert main(command.split()) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert message in captured.err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("-p 1,x", "invalid integer value"),
        ("-p 0", "0 is not at least 1"),
        ("--compare llama", "'llama' is none of mlx-lm, transformers"),
        ("--dtype int8", "'int8' is none of float32"),
    ],
)
def test_bad_lists(capsys, command, message):
    with pytest.raises(SystemExit) as exit:
        main(command.split())
    assert exit.value.code == 2 and message in capsys.readouterr().err


def test_a_baseline_that_is_not_installed(capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "torch" else find(name)
    )
    assert main(["--shape", "micro", "--compare", "mlx-lm,transformers"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "torch is not installed" in error
    assert "pip install '.[parity]'" in error


def test_pictures_need_matplotlib(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["--shape", "micro", "--plot", str(tmp_path / "x.svg")]) == 1
    assert "pip install '.[plot]'" in capsys.readouterr().err
