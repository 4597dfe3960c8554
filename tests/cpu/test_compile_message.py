"""Compiling the Numba kernels is announced once, and left out of speeds."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import mlx.core as mx
import pytest

from mlx_rgemma.cpu import numba_runtime
from mlx_rgemma.generation.batch import _subtract_compilation
from mlx_rgemma.generation.response import text_responses

CODE = """
import sys, time
import mlx_rgemma
from mlx_rgemma import cli
import numpy as np
from mlx_rgemma.cpu import numba_runtime

def work():
    started = time.perf_counter()
    x, y = np.ones(64, np.float32), np.empty(64, np.float32)
    for _ in range(2):
        numba_runtime.run("gated_gelu", 64, x, x, y)
    took = time.perf_counter() - started
    compile_seconds = numba_runtime.compile_seconds
    print(took, compile_seconds(started), compile_seconds(time.perf_counter()))

cli.run(work)
"""


def test_a_cold_cache_is_announced_once_and_timed(tmp_path):
    pytest.importorskip("numba")
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", CODE]
    cold, warm = (
        subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        for _ in range(2)
    )
    assert (cold.returncode, cold.stderr) == (0, f"{numba_runtime.COMPILING}\n")
    took, compiling, later = map(float, cold.stdout.split())
    assert 0.2 * took < compiling < took  # the rest: importing Numba, and running
    assert later == 0
    assert (warm.returncode, warm.stderr) == (0, "")
    assert float(warm.stdout.split()[1]) == 0


def test_only_what_falls_into_the_time_counts(monkeypatch):
    monkeypatch.setattr(numba_runtime, "_compiled", [(1.0, 4.0), (6.0, 7.0)])
    seconds = [numba_runtime.compile_seconds(since) for since in (0.0, 2.0, 5.0, 6.5, 8.0)]
    assert seconds == [4.0, 3.0, 1.0, 0.5, 0.0]


def test_speeds_leave_compilation_out(monkeypatch):
    from mlx_rgemma import load

    _, tokenizer = load()
    compiled: list[tuple[float, float]] = []
    monkeypatch.setattr(numba_runtime, "_compiled", compiled)

    def steps():
        for token in (5, 6):
            begin = time.perf_counter()
            time.sleep(0.3)
            compiled.append((begin, time.perf_counter()))
            time.sleep(0.05)
            yield token, mx.zeros(1), False

    started = time.perf_counter()
    first, second = text_responses(
        steps(), tokenizer, 2, stop=(), prompt_tokens=100, started=started
    )
    assert 500 < first.prompt_tps < 100 / 0.05
    assert 10 < second.generation_tps <= 2 / 0.05


def test_a_batchs_speeds_leave_it_out():
    from mlx_lm.generate_utils import BatchStats

    stats = BatchStats(prompt_tokens=100, prompt_time=11.0, generation_tokens=50, wall_time=16.0)
    _subtract_compilation(stats, 10.0)
    assert (stats.prompt_tps, stats.generation_tps) == (100.0, 10.0)
    _subtract_compilation(stats, 4.0)  # more than the prompt took: of decoding
    assert (stats.prompt_tps, stats.generation_tps) == (100.0, 50.0)
