"""Adam and AdamW in pieces give what MLX's give, to the bit, in the memory of the gradients."""

from __future__ import annotations

import sys
import warnings
from types import SimpleNamespace

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mlx_rgemma.ops import lanes
from mlx_rgemma.tuner import adam
from mlx_rgemma.tuner.optimizers import make_optimizer
from mlx_rgemma.tuner.rules import adamw
from mlx_rgemma.tuner.shared_updates import share_updates

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="updates go in pieces on a Linux CPU only"
)

SHAPES = {"a": {"w": (40, 30), "bias": (7,)}, "layers": [{"w": (9, 9, 5)}, {"w": (64,), "v": (3,)}]}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(lanes, "LEAST", 64)
    monkeypatch.setattr(adam, "PIECE", 32)


def tree(seed: int, dtype: mx.Dtype = mx.float32) -> dict:
    keys = iter(mx.random.split(mx.random.key(seed), 10))
    shapes = tree_map(mx.zeros, SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    return tree_map(lambda z: mx.random.normal(z.shape, dtype, key=next(keys)), shapes)


def after(optimizer: optim.Optimizer, gradients: list[dict], **kwargs) -> dict[str, mx.array]:
    """All that there is after some updates."""
    parameters = tree(0, **kwargs)
    for each in gradients:
        parameters = optimizer.apply_gradients(each, parameters)
        mx.eval(parameters, optimizer.state)
    return dict(tree_flatten([parameters, optimizer.state]))


def place(array: mx.array) -> int:
    return np.array(array, copy=False).ctypes.data


KINDS = {
    "Adam": lambda: optim.Adam(0.1),
    "Adam, corrected": lambda: optim.Adam(0.1, betas=[0.8, 0.95], eps=1e-6, bias_correction=True),
    "AdamW": lambda: optim.AdamW(0.1, weight_decay=0.3),
    "AdamW, corrected": lambda: optim.AdamW(0.1, weight_decay=0.3, bias_correction=True),
    "a schedule": lambda: optim.AdamW(lambda step: 0.1 / (1.0 + step.astype(mx.float32))),
    "groups": lambda: optim.MultiOptimizer(
        [optim.AdamW(0.1, weight_decay=0.3), optim.Adam(0.2)], [lambda name, _: "w" in name]
    ),
}


@pytest.mark.parametrize("cores", [1, 2, 3])
@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_the_bits_are_those_of_mlx(make, cores, monkeypatch):
    monkeypatch.setattr(lanes, "cores", lambda: cores)
    used = []
    apply = adam._Rule.apply
    monkeypatch.setattr(
        adam._Rule, "apply", lambda *args: (used.append(args[1].size), apply(*args))[1]
    )
    seeds = (1, 2, 3)
    expected = after(make(), [tree(seed) for seed in seeds])
    assert not used
    found = after(share_updates(make()), [tree(seed) for seed in seeds])
    assert sorted(used) == sorted([40 * 30, 9 * 9 * 5, 64] * len(seeds))
    assert found.keys() == expected.keys()
    assert all(mx.array_equal(found[name], expected[name]).item() for name in expected)


def test_no_more_memory_than_the_gradients_take():
    optimizer = share_updates(optim.AdamW(0.1))
    parameters, gradients = {"w": mx.ones((1000, 300))}, {"w": mx.full((1000, 300), 0.5)}
    optimizer.init(parameters)
    mx.eval(parameters, gradients, optimizer.state)
    moments = [place(optimizer.state["w"][name]) for name in "mv"]
    mx.synchronize()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    updated = optimizer.apply_gradients(gradients, parameters)
    assert mx.get_peak_memory() - before < 4096
    assert place(updated["w"]) == place(gradients["w"]) != place(parameters["w"])
    assert [place(optimizer.state["w"][name]) for name in "mv"] == moments
    assert mx.array_equal(parameters["w"], mx.ones((1000, 300))).item()  # others may hold it


def test_gradients_of_the_last_layers_are_computed_first(monkeypatch):
    """So that those of all layers never exist at once."""
    optimizer = share_updates(optim.Adam(0.1))
    parameters = {"layers": [{"w": mx.ones((100, 100))} for _ in range(8)]}
    optimizer.init(parameters)
    mx.eval(parameters, optimizer.state)
    shares = []
    apply = adam._Rule.apply

    def watched(rule, *views):
        shares.append(float(views[0][0]))
        apply(rule, *views)

    monkeypatch.setattr(adam._Rule, "apply", watched)
    gradients = {"layers": [{"w": mx.full((100, 100), float(i))} for i in range(8)]}
    optimizer.apply_gradients(gradients, parameters)
    assert shares == [7, 6, 5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_other_dtypes_are_left_to_mlx(dtype):
    gradients = [tree(1, dtype=dtype), tree(2, dtype=dtype)]
    expected = after(optim.AdamW(0.1), gradients, dtype=dtype)
    found = after(share_updates(optim.AdamW(0.1)), gradients, dtype=dtype)
    assert all(mx.array_equal(found[name], expected[name]).item() for name in expected)


def test_a_gradient_that_lies_otherwise():
    gradients, parameters = {"w": mx.arange(200.0).reshape(10, 20).T}, {"w": mx.ones((20, 10))}
    expected = optim.Adam(0.1).apply_gradients(gradients, parameters)
    found = share_updates(optim.Adam(0.1)).apply_gradients(gradients, parameters)
    assert mx.array_equal(found["w"], expected["w"]).item()


def test_gradients_that_are_parameters():
    """Of half the square of a weight, say, or of a product of two."""
    a, b = mx.random.normal((20, 10)), mx.random.normal((20, 10))
    parameters, gradients = {"a": a, "b": b, "c": mx.ones_like(a)}, {"a": b, "b": b + 1, "c": a}
    expected = optim.Adam(0.1).apply_gradients(gradients, parameters)
    mx.eval(expected)
    before = [np.array(z) for z in (a, b)]
    found = share_updates(optim.Adam(0.1)).apply_gradients(gradients, parameters)
    assert all(mx.array_equal(found[name], expected[name]).item() for name in expected)
    assert all(np.array_equal(x, y) for x, y in zip(before, (a, b), strict=True))


def test_one_gradient_of_two_parameters_is_refused():
    gradient = mx.ones((20, 10))
    both = {"a": gradient, "b": gradient}
    with pytest.raises(ValueError, match="two parameters have one gradient"):
        share_updates(optim.Adam(0.1)).apply_gradients(both, tree_map(mx.zeros_like, both))


def test_infinities_pass_without_a_word():
    gradients = {"w": mx.array([float("inf"), float("nan"), 1e30, 0.0] * 20)}
    parameters = {"w": mx.ones((80,))}
    expected = optim.Adam(0.1).apply_gradients(gradients, parameters)
    mx.eval(expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = share_updates(optim.Adam(0.1)).apply_gradients(gradients, parameters)
    assert np.array_equal(np.array(found["w"]), np.array(expected["w"]), equal_nan=True)


def test_the_trainers_have_such_optimizers():
    settings = SimpleNamespace(
        optimizer="adamw", optimizer_config={}, learning_rate=0.1, lr_schedule=None
    )
    for optimizer in (make_optimizer(settings), adamw(0.1, weight_decay=0.1)):
        gradients = {"a": {"weight": mx.ones((40, 30))}}
        found = optimizer.apply_gradients(gradients, tree_map(mx.zeros_like, gradients))
        assert place(found["a"]["weight"]) == place(gradients["a"]["weight"])
