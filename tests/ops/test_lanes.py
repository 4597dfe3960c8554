"""Halves of large arrays on two threads of a Linux CPU give what the whole gives, bit for bit."""

from __future__ import annotations

import sys
import threading

import mlx.core as mx
import pytest

from mlx_rgemma.ops import gated_gelu, lanes, rg_lru, windowed_attention
from mlx_rgemma.ops.attention_plain import Ring

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="work is shared on a Linux CPU only"
)


@pytest.fixture(params=["shared", "whole"])
def both(request, monkeypatch):
    """-> how often work went to the other thread."""
    count = []
    lane = lanes._beside

    def beside():
        count.append(1)
        return lane()

    monkeypatch.setattr(lanes, "_beside", beside)
    monkeypatch.setattr(lanes, "_cores", lambda: 2 if request.param == "shared" else 1)
    monkeypatch.setattr(lanes, "LEAST", 64)
    yield count
    assert bool(count) == (request.param == "shared")


RESULTS: dict[str, list[mx.array]] = {}


def same(name: str, arrays: list[mx.array]) -> None:
    mx.eval(arrays)
    before = RESULTS.setdefault(name, arrays)
    assert all(mx.array_equal(x, y).item() for x, y in zip(before, arrays, strict=True))


def normal(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


@pytest.mark.parametrize("shape", [(1, 5, 96), (3, 7, 33), (1, 1, 4096), (2, 300, 160)])
def test_gelu(both, shape):
    gate, x = 3.0 * normal(*shape), normal(*shape, seed=1)
    value, gradients = mx.value_and_grad(lambda g, x: gated_gelu(g, x).sum(), (0, 1))(gate, x)
    same(f"gelu {shape}", [gated_gelu(gate, x), value, *gradients])


@pytest.mark.parametrize("shape", [(1, 9, 96), (3, 100, 99), (2, 300, 160)])
def test_rg_lru(both, shape):
    arguments = [normal(*shape, seed=i) for i in range(3)]
    a_param = normal(shape[-1], seed=3)
    reset = mx.arange(shape[1])[None] % 4 == 0

    def loss(*arrays):
        return rg_lru(*arrays, reset=reset)[0].square().sum()

    gradients = mx.grad(loss, (0, 1, 2, 3))(*arguments, a_param)
    same(f"rg_lru {shape}", [*rg_lru(*arguments, a_param, reset=reset), *gradients])


@pytest.mark.parametrize("past", [0, 200])
def test_attention(both, past):
    q, k, v = (normal(2, heads, 400, 16, seed=heads) for heads in (3, 1, 1))
    ring = Ring(normal(2, 2, past, 16, seed=5), 0) if past else None
    out = windowed_attention(q, k, v, window=150, ring=ring)
    gradient = mx.grad(lambda q: windowed_attention(q, k, v, window=150, ring=ring).sum())(q)
    same(f"attention {past}", [out, gradient])


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
    monkeypatch.setattr(lanes, "_cores", lambda: 2)
    assert not lanes.worthwhile(lanes.LEAST - 1)
    assert lanes.worthwhile(lanes.LEAST) == (mx.default_device().type == mx.cpu)
