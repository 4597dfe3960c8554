"""Splitting large arrays across two streams changes no bit."""

from __future__ import annotations

import threading

import mlx.core as mx
import pytest

from mlx_rgemma.cpu import streams
from mlx_rgemma.ops import gated_gelu, rg_lru
from mlx_rgemma.ops.cross_entropy import cross_entropies


@pytest.fixture
def same(monkeypatch):
    """Computes arrays with one core and with two: the second thread is used, the bits agree."""
    side, used = streams._side_stream, []
    monkeypatch.setattr(streams, "_side_stream", lambda: (used.append(1), side())[1])
    monkeypatch.setattr(streams, "MIN_ELEMENTS", 64)

    def check(compute):
        results = []
        for threads in (1, 2):
            monkeypatch.setattr(streams, "num_threads", lambda threads=threads: threads)
            results.append(compute())
            mx.eval(results[-1])
            assert bool(used) == (threads == 2)
        assert all(mx.array_equal(x, y).item() for x, y in zip(*results, strict=True))

    return check


def normal(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


@pytest.mark.parametrize("shape", [(1, 5, 96), (3, 7, 33), (1, 1, 4096), (2, 300, 160)])
def test_gelu(same, shape):
    gate, x = 3.0 * normal(*shape), normal(*shape, seed=1)
    gradients = mx.grad(lambda g, x: gated_gelu(g, x).sum(), (0, 1))
    same(lambda: [gated_gelu(gate, x), *gradients(gate, x)])


@pytest.mark.parametrize("shape", [(1, 9, 96), (3, 100, 99), (2, 300, 160)])
def test_rg_lru(same, shape):
    arguments = [normal(*shape, seed=i) for i in range(3)]
    a_param = normal(shape[-1], seed=3)
    reset = mx.arange(shape[1])[None] % 4 == 0

    def loss(*arrays):
        return rg_lru(*arrays, reset=reset)[0].square().sum()

    gradients = mx.grad(loss, (0, 1, 2, 3))
    same(lambda: [*rg_lru(*arguments, a_param, reset=reset), *gradients(*arguments, a_param)])


@pytest.mark.parametrize("cap", [30.0, 0.0])
def test_cross_entropy(same, cap):
    scores, targets = 9.0 * normal(21, 5000), mx.arange(21) * 7

    def total(scores):
        return cross_entropies(scores, targets, cap).sum()

    same(lambda: [cross_entropies(scores, targets, cap), mx.grad(total)(scores)])


def test_in_other_threads():
    gate = normal(1, 512, 512)
    mx.eval(gate)  # what is not computed yet belongs to its thread
    found = []

    def work():
        found.append(gated_gelu(gate, gate).sum().item())

    for _ in range(2):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    work()
    assert len(found) == 3 and len(set(found)) == 1


def test_small_arrays_stay_on_one_stream(monkeypatch):
    monkeypatch.setattr(streams, "num_threads", lambda: 2)
    monkeypatch.setattr(streams, "_side_stream", lambda: pytest.fail("a second stream was used"))
    small = normal(streams.MIN_ELEMENTS // 64 - 1, 64)
    streams.split_across_streams(lambda x: (x + 1.0,), small)
