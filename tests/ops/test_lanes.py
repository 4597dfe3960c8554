"""Halves of large arrays on two threads of a Linux CPU give what the whole gives, bit for bit."""

from __future__ import annotations

import sys
import threading

import mlx.core as mx
import pytest

from mlx_rgemma.ops import gated_gelu, lanes, rg_lru, windowed_attention
from mlx_rgemma.ops.attention_plain import Ring
from mlx_rgemma.ops.cross_entropy import cross_entropies

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="work is shared on a Linux CPU only"
)


@pytest.fixture
def same(monkeypatch):
    """Computes arrays with one core and with two: the second thread is used, the bits agree."""
    beside, used = lanes._beside, []
    monkeypatch.setattr(lanes, "_beside", lambda: (used.append(1), beside())[1])
    monkeypatch.setattr(lanes, "LEAST", 64)

    def check(compute):
        results = []
        for cores in (1, 2):
            monkeypatch.setattr(lanes, "cores", lambda cores=cores: cores)
            results.append(compute())
            mx.eval(results[-1])
            assert bool(used) == (cores == 2)
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


@pytest.mark.parametrize("past", [0, 200])
def test_attention(same, past):
    q, k, v = (normal(2, heads, 400, 16, seed=heads) for heads in (3, 1, 1))
    ring = Ring(normal(2, 2, past, 16, seed=5), 0) if past else None

    def attend(q):
        return windowed_attention(q, k, v, window=150, ring=ring)

    same(lambda: [attend(q), mx.grad(lambda q: attend(q).sum())(q)])


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


def test_small_arrays_stay_where_they_are(monkeypatch):
    monkeypatch.setattr(lanes, "cores", lambda: 2)
    assert not lanes.worthwhile(lanes.LEAST - 1)
    assert lanes.worthwhile(lanes.LEAST) == (mx.default_device().type == mx.cpu)
