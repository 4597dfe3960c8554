"""What a call launches on a GPU, counted in its recorded graph."""

from __future__ import annotations

import json
import subprocess
import sys

import mlx.core as mx
import pytest

from mlx_rgemma.evaluation.launch_count import (
    count_launches,
    count_layer,
    count_model,
    small_model,
)

CYCLE = ("recurrent", "recurrent", "attention")


def test_counting_by_hand():
    def function(x, w):
        y = mx.fast.rms_norm(x @ w, None, 1e-5)  # two launches
        z = y.swapaxes(0, 1).reshape(-1)  # a view that copies
        return z.reshape(2, -1)[:1] + 1.0, mx.contiguous(y)  # views; two launches

    launches = count_launches(function, mx.ones((4, 8)), mx.ones((8, 6)))
    assert dict(launches.kinds) == {"Matmul": 1, "rms_norm": 1, "Add": 1, "contiguous": 1}
    assert launches.copied == 1


@pytest.mark.parametrize("kind", ["recurrent", "attention"])
def test_launches_of_a_layer(kind):
    """mlx-lm: about 30 in a decode step, and hundreds for a chunk of a prompt."""
    assert count_layer(kind, 1) <= 12
    counts = {count_layer(kind, length) for length in (32, 64, 300)}
    assert len(counts) == 1
    assert counts.pop() <= 20


def test_a_decode_step_copies_nothing():
    assert count_model(small_model(3, CYCLE), 1).copied == 0


def test_the_ring_is_never_copied_in_a_decode_step():
    kinds = count_model(small_model(3, CYCLE), 1).kinds
    assert kinds["SliceUpdate"] == 1  # of the attention layer's ring: keys and values at once
    assert kinds["Concatenate"] == 0


def test_mlx_lm_grows_with_the_prompt_and_this_does_not():
    config = small_model(3, CYCLE)
    ours, theirs = (
        [count_model(config, n, theirs=theirs).total for n in (16, 48)] for theirs in (False, True)
    )
    assert ours[0] == ours[1]
    assert theirs[1] > theirs[0] + 32


def test_the_command_prints_the_table():
    result = subprocess.run(
        [sys.executable, "-m", "mlx_rgemma.launches", "--prompt", "32", "--json"],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    answer = json.loads(result.stdout)
    assert answer["layers"] == 26
    step, chunk = answer["calls"]
    assert step["model"] < step["mlx_lm"] / 3
    assert chunk["model"] < chunk["mlx_lm"] / 3
