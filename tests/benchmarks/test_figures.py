"""The figures of a benchmark, worked out by hand; memory, bandwidth, pictures, start-up."""

from __future__ import annotations

import json
import mmap
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from benchmarks.harness import memory, plot
from benchmarks.harness.plan import Case, Plan
from benchmarks.harness.results import Result, flatness, ratios
from benchmarks.startup import TITLES
from benchmarks.startup_probe import Profiler
from mlx_rgemma.evaluation import machine
from mlx_rgemma.io.memory import physical_memory

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def made(engine, kind, length, seconds, batch=1, **changes):
    """A result whose trials took these seconds for everything."""
    trials = [
        {
            "first_token_s": s,
            "last_token_s": 3 * s,
            "tokens": 5,
            "state_bytes": 100,
            "step_s": s,
            "peak_memory_bytes": 7,
            "process_peak_bytes": 9,
        }
        for s in seconds
    ]
    values = {
        "weight_bytes": 500,
        "read_bytes": 900,
        "trials": trials,
        "bandwidth": [4000.0],
        **changes,
    }
    return Result(engine, "float32", "none", Case(kind, length, batch), **values)


def test_figures_by_hand():
    result = made("mlx_rgemma", "generate", 10, (1.0, 2.0, 4.0), batch=2)
    assert result.prompt_tps.values == (20, 10, 5) and result.prompt_tps.median == 10
    assert (result.prompt_tps.low, result.prompt_tps.high) == (5, 20)
    assert result.generation_tps.values == (4, 2, 1)  # 2 rows, 4 steps in 2 s
    assert result.training_tps is None and result.first_token_s.median == 2
    assert result.bytes_per_step == 1000
    assert result.bandwidth_share == pytest.approx(2 / 2 * 1000 / 4000)
    trained = made("mlx_rgemma", "train", 10, (2.0,), batch=3)
    assert trained.training_tps.median == 15 and trained.generation_tps is None


def test_memory_falls_back_on_the_process():
    result = made("transformers", "generate", 10, (1.0, 2.0))
    assert result.peak_memory_bytes == 7
    result.trials[1]["peak_memory_bytes"] = None
    assert result.peak_memory_bytes == 9


def test_ratios_compare_like_with_like():
    ours = [made("mlx_rgemma", "generate", n, (1.0,)) for n in (10, 20)]
    theirs = [made("mlx-lm", "generate", 20, (4.0,)), made("mlx-lm", "generate", 30, (4.0,))]
    found = ratios([*ours, *theirs])
    assert [(r.figure, r.case.length, r.ratio) for r in found] == [
        ("prompt_tps", 20, 4.0),
        ("generation_tps", 20, 4.0),
    ]


def test_flatness_is_the_longest_by_the_shortest():
    results = [made("mlx_rgemma", "generate", n, (s,)) for n, s in ((20, 3.0), (10, 1.0))]
    results += [made("mlx_rgemma", "after", n, (s,)) for n, s in ((5, 1.0), (50, 2.0))]
    found = flatness([*results, made("mlx_rgemma", "train", 10, (1.0,))])
    assert [(f.figure, f.short, f.long) for f in found] == [
        ("prompt_tps", 10, 20),
        ("generation_tps", 5, 50),
    ]
    assert [f.ratio for f in found] == pytest.approx([2 / 3, 1 / 2])


def test_rounds_train_last():
    sizes = {"prompt_tokens": (8, 16), "batch_sizes": (1, 4), "after": (5, 100)}
    (first, n), (second, often), (third, last) = Plan(**sizes, train_tokens=(8,), trials=2).rounds()
    titles = ["prompt 8", "prompt 8, batch 4", "prompt 16", "prompt 16, batch 4"]
    assert [c.title for c in first] == titles
    assert [c.title for c in second] == [f"generation after {n} tokens" for n in (5, 100)]
    assert [(c.kind, c.batch_size) for c in third] == [("train", 1), ("train", 4)]
    assert (n, often, last) == (2, 6, 2)


def test_what_is_copied_fits_in_no_cache(tmp_path):
    assert machine.copied_bytes(tmp_path) == 256 * 2**20
    for i, size in enumerate(("32K", "2M", "96M")):
        (tmp_path / f"index{i}").mkdir()
        (tmp_path / f"index{i}" / "size").write_text(size + "\n")
    assert machine.copied_bytes(tmp_path) == 4 * 96 * 2**20


def test_a_copy_has_a_speed_and_leaves_nothing():
    before = mx.get_active_memory()
    assert machine.copy_bandwidth(1 << 22, repeats=1) > 0
    assert machine.copy_by_mlx(1 << 20, repeats=1) > 0
    assert mx.get_active_memory() == before


def test_the_peak_of_the_process():
    begins_anew = memory.reset_process_peak()
    before = memory.process_peak()
    block = mmap.mmap(-1, 64 << 20)  # not from the heap, which may hold as much that is free
    np.frombuffer(block, np.uint8)[:] = 1
    peak = memory.process_peak()
    assert peak >= before + (60 << 20) or not begins_anew
    block.close()
    if begins_anew:
        assert memory.reset_process_peak() and memory.process_peak() < peak - (50 << 20)
    assert physical_memory() > peak


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra: pip install '.[plot]'")
    results = [made(e, "generate", n, (1.0,)) for e in ("mlx_rgemma", "mlx-lm") for n in (8, 16)]
    for suffix in plot.FORMATS:
        plot.plot(tmp_path / f"x{suffix}", "a title", results)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.pdf", "x.png", "x.svg"]
    text = (tmp_path / "x.svg").read_text()
    for word in ("a title", "prompt tokens/s", "mlx_rgemma", "mlx-lm"):
        assert f">{word}<" in text
    assert "training" not in text and len(text) < 100_000


def test_the_profiler_counts_no_second_twice(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    profiler = Profiler()

    def spend(seconds, then=lambda: None):
        now[0] += seconds
        then()
        now[0] += seconds

    inner = profiler.timed("inner", lambda: spend(1))
    profiler.timed("outer", lambda: spend(10, inner))()
    spend(100)
    profiler.switch()
    assert profiler.seconds == {"rest": 200, "outer": 20, "inner": 2}


@pytest.mark.parametrize(
    "options, more", [([], set()), (["--temp", "1"], {"mlx_lm", "transformers"})]
)
def test_the_way_to_the_first_token_is_booked(options, more):
    probe = ["-m", "benchmarks.startup_probe", "0", "--max-tokens", "1"]
    result = subprocess.run(
        [sys.executable, *probe, *options],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    *_, last = result.stdout.splitlines()
    booked = json.loads(last)
    assert set(booked) == {"python", "package", "mlx", "tokenizer", "weights", "rest"} | more
    assert set(booked) <= set(TITLES) and min(booked.values()) > 0
    assert "Generation: 1 tokens" in result.stdout


def test_the_picture_of_a_long_text(tmp_path):
    file = tmp_path / "points.json"
    options = "--shape micro --trials 1 --contexts 0 256 1024 --chunk 16 --generate 3 --json"
    subprocess.run(
        [sys.executable, "-m", "benchmarks.flat_or_growing", *options.split(), str(file)],
        check=True,
        timeout=120,
        capture_output=True,
    )
    points = json.loads(file.read_text())["points"]
    griffin, gemma = ([p for p in points if word in p["model"]] for word in ("Recurrent", "mlx-lm"))
    assert [p["tokens"] for p in griffin] == [p["tokens"] for p in gemma] == [0, 256, 1024]
    assert len({p["state_mb"] for p in griffin}) == 1
    a_token = 3 * 2 * 32 * 4  # layers, keys and values, width of a head, bytes
    assert [p["state_mb"] * 1e6 for p in gemma] == [0, 256 * a_token, 1024 * a_token]


def test_figures_are_put_into_documents(tmp_path):
    (tmp_path / "speed.txt").write_text(
        "Machine: x\nPackages: y\n\nModel: z\nTrial 1: y\n\n| a |\n| 1 |\n\n| b |\n\nNote: c\n"
    )
    document = tmp_path / "page.md"
    place = "<!-- figures {} -->\nold\n<!-- end -->\n"
    names = ("speed: | b", "speed:", "speed: Machine", "missing:")
    document.write_text("text\n" + "".join(map(place.format, names)))
    command = [sys.executable, str(BENCHMARKS / "insert_figures.py"), str(tmp_path), str(document)]
    for _ in range(2):  # a second time changes nothing
        subprocess.run(command, check=True, timeout=60)
        contents = ("| b |", "| a |\n| 1 |\n\n| b |\n\nNote: c", "Machine: x\\\nPackages: y", "old")
        assert document.read_text() == "text\n" + "".join(
            f"<!-- figures {name} -->\n{content}\n<!-- end -->\n"
            for name, content in zip(names, contents, strict=True)
        )
