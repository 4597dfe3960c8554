"""Adam in one pass is Adam, bit for bit, and holds nothing twice."""

from __future__ import annotations

from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from helpers.models import golden_model
from mlx.utils import tree_flatten, tree_map

from mlx_rgemma.cpu import numba_runtime
from mlx_rgemma.cpu.adam import fuse_adam
from mlx_rgemma.tuner.data.packing import Batch
from mlx_rgemma.tuner.loss import batch_loss
from mlx_rgemma.tuner.optim import adamw, make_optimizer


@pytest.fixture
def ran(ran, monkeypatch) -> list[str]:
    """Those shared by all cores: of arrays of 64 elements and more. Smaller ones go by "serial"."""
    monkeypatch.setattr(numba_runtime, "MIN_ELEMENTS", 64)
    serial = numba_runtime.run_serial
    monkeypatch.setattr(
        numba_runtime, "run_serial", lambda *rest: (ran.append("serial"), serial(*rest))
    )
    return ran


def normal(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def small_model() -> nn.Module:
    mx.random.seed(0)
    return nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 8), nn.LayerNorm(8))


def trained(optimizer: optim.Optimizer, updates: int = 4) -> list[tuple[str, np.ndarray]]:
    """Weights and moments after some updates."""
    model = small_model()
    for seed in range(updates):
        gradients = tree_map(lambda x, s=seed: normal(*x.shape, seed=s), model.parameters())
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
    flat = tree_flatten([model.parameters(), optimizer.state])
    return [(name, np.array(x)) for name, x in flat]


def same(one: list, other: list) -> bool:
    return [n for n, _ in one] == [n for n, _ in other] and all(
        np.array_equal(x, y) for (_, x), (_, y) in zip(one, other, strict=True)
    )


def schedule(step: mx.array) -> mx.array:
    return 0.1 / (1.0 + step)


OPTIMIZERS = {
    "Adam": lambda: optim.Adam(1e-2),
    "Adam, corrected": lambda: optim.Adam(1e-2, betas=[0.8, 0.95], bias_correction=True),
    "AdamW": lambda: optim.AdamW(1e-2, weight_decay=0.3, eps=1e-3),
    "AdamW, scheduled": lambda: optim.AdamW(schedule, bias_correction=True),
    "two groups": lambda: optim.MultiOptimizer(
        [optim.AdamW(0.1), optim.SGD(0.1)], [lambda name, x: x.ndim > 1]
    ),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_updates_are_those_of_mlx_bit_for_bit(ran, make):
    expected = trained(make())
    assert not ran
    assert same(trained(fuse_adam(make())), expected)
    expected_runs = {"adam": 2 * 4, "serial": 0 if make is OPTIMIZERS["two groups"] else 4 * 4}
    assert {name: ran.count(name) for name in expected_runs} == expected_runs


def test_few_numbers_stay_mlxs(ran, monkeypatch):
    """Also where they are many together, as adapters are."""
    monkeypatch.setattr(numba_runtime, "MIN_ELEMENTS", 30 * 40 + 1)
    assert same(trained(fuse_adam(optim.Adam(1e-2))), trained(optim.Adam(1e-2)))
    assert not ran
    monkeypatch.setattr(numba_runtime, "MIN_ELEMENTS", numba_runtime.MIN_ELEMENTS - 1)
    trained(fuse_adam(optim.Adam(1e-2)))
    assert set(ran) == {"adam", "serial"}


@pytest.mark.parametrize("name", ["SGD", "Adafactor", "Lion", "Adamax"])
def test_other_optimizers_stay_what_they_are(ran, name):
    make = getattr(optim, name)
    assert same(trained(fuse_adam(make(1e-2))), trained(make(1e-2)))
    assert not ran


def test_half_precision_stays_mlxs(ran):
    found = []
    for wrap in (lambda x: x, fuse_adam):
        model, optimizer = small_model(), wrap(optim.Adam(1e-2))
        model.set_dtype(mx.bfloat16)
        gradients = tree_map(lambda x: normal(*x.shape).astype(x.dtype), model.parameters())
        optimizer.update(model, gradients)
        found.append([np.array(x.astype(mx.float32)) for _, x in tree_flatten(model.parameters())])
    assert all(np.array_equal(x, y) for x, y in zip(*found, strict=True)) and not ran


def test_within_a_compiled_step(ran):
    """As mlx-lm's trainer compiles it: arrays have no values there."""
    model, other = small_model(), small_model()
    optimizer, plain = fuse_adam(optim.AdamW(1e-2)), optim.AdamW(1e-2)
    state = [model.state, optimizer.state]
    gradients = tree_map(lambda x: normal(*x.shape), model.parameters())

    def step():
        optimizer.update(model, tree_map(lambda x: x, gradients))

    optimizer.init(model.trainable_parameters())
    mx.compile(step, inputs=state, outputs=state)()
    plain.update(other, gradients)
    assert not ran
    for (_, x), (_, y) in zip(
        tree_flatten(model.parameters()), tree_flatten(other.parameters()), strict=True
    ):
        assert mx.allclose(x, y, atol=1e-6)


def test_what_was_held_of_a_model_does_not_change(ran):
    model = small_model()
    held = dict(tree_flatten(model.parameters()))
    before = {name: np.array(x) for name, x in held.items()}
    optimizer = fuse_adam(optim.AdamW(0.1))
    for _ in range(2):
        optimizer.update(model, tree_map(lambda x: normal(*x.shape), model.parameters()))
        mx.eval(model.parameters())
    assert ran
    assert all(np.array_equal(x, before[name]) for name, x in held.items())
    assert not np.array_equal(model.layers[0].weight, before["layers.0.weight"])


def test_one_array_in_two_places(ran):
    """Each place is updated with its own gradient, from the value that both had."""
    found = []
    for wrap in (lambda x: x, fuse_adam):
        model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
        model.layers[0].weight = model.layers[1].weight = normal(20, 20)
        gradients = {"layers": [{"weight": normal(20, 20, seed=s)} for s in (1, 2)]}
        wrap(optim.Adam(0.1)).update(model, gradients)
        found.append([np.array(layer.weight) for layer in model.layers])
    assert ran and all(np.array_equal(x, y) for x, y in zip(*found, strict=True))
    assert not np.array_equal(*found[0])


class _Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = mx.ones((20, 20)), mx.zeros((20, 20))


def test_one_gradient_of_two_parameters_is_refused(ran):
    """Its memory can become one parameter's only."""
    model, x = _Sum(), normal(20, 20)
    gradients = mx.grad(lambda p: ((p["a"] + p["b"]) * x).sum())(model.parameters())
    with pytest.raises(ValueError, match=r"\[adam\] two parameters share one gradient"):
        fuse_adam(optim.Adam(0.1)).update(model, gradients)
    assert ran == ["adam"]


def test_no_two_parameters_of_a_griffin_share_one(ran, model_name):
    """Three steps, with gradients that nobody has computed before the update."""
    ids = mx.arange(41)[None] % 90 + 2
    batch = Batch(ids[:, :-1], ids[:, 1:], mx.ones((1, 40), mx.bool_), mx.arange(40)[None])
    found = []
    for wrap in (lambda x: x, fuse_adam):
        model, optimizer = golden_model(model_name, fuse=False), wrap(optim.AdamW(1e-2))
        model.train()
        gradients = nn.value_and_grad(model, lambda m: batch_loss(m, batch)[0])
        for _ in range(3):
            optimizer.update(model, gradients(model)[1])
            mx.eval(model.parameters(), optimizer.state)
        found.append([(name, np.array(x)) for name, x in tree_flatten(model.parameters())])
    assert ran and same(*found)


def test_no_parameter_but_one_is_there_twice(ran):
    """While gradients are computed one after the other, as an update needs them."""
    model = nn.Sequential(*[nn.Linear(256, 256, bias=False) for _ in range(16)])
    optimizer = fuse_adam(optim.Adam(1e-3))
    optimizer.init(model.trainable_parameters())
    mx.eval(model.parameters(), optimizer.state)
    one = 4 * 256 * 256
    for _ in range(2):
        gradients = tree_map(lambda x: x * 0.5, model.parameters())  # not computed yet
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        optimizer.update(model, gradients)
        del gradients
        mx.eval(model.parameters(), optimizer.state)
        assert mx.get_peak_memory() - before < 4 * one
        assert mx.get_active_memory() - before < one
    assert len(ran) == 32


def test_trainers_take_one_pass(ran):
    """The optimizers of both trainers are those that do."""
    settings = SimpleNamespace(
        optimizer="adamw", optimizer_config={}, learning_rate=0.1, lr_schedule=None
    )
    for make in (lambda: make_optimizer(settings), lambda: adamw(0.1, weight_decay=0.1)):
        ran.clear()
        model = nn.Module()  # pre-training decides on weight decay by the name of a module
        model.up_proj, model.down_proj = nn.Linear(30, 40), nn.Linear(40, 8)
        gradients = tree_map(lambda x: normal(*x.shape), model.parameters())
        optimizer = make()
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
        assert ran.count("adam") == 2
