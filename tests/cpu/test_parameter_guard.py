"""Replaced parameters are detected."""

from __future__ import annotations

import gc
import weakref

import mlx.core as mx
import mlx.nn as nn
import pytest
from helpers.random_models import random_model

from mlx_rgemma.cpu.parameter_guard import ParameterGuard


def block(model):
    return model.layers[1].mlp_block


CHANGES = {
    "a weight": lambda m: block(m).down_proj.update({"weight": block(m).down_proj.weight + 0.0}),
    "a layer": lambda m: setattr(block(m), "down_proj", nn.Linear(256, 128)),
    "a layer of the list": lambda m: m.layers.__setitem__(0, m.layers[0].__class__(m.args, "x")),
    "a layer more": lambda m: m.layers.append(m.layers[0]),
    "a parameter more": lambda m: setattr(block(m).down_proj, "scale", mx.ones(1)),
    "a parameter less": lambda m: block(m).down_proj.pop("bias"),
    "an attribute": lambda m: setattr(m.layers[0].temporal_pre_norm, "eps", 0.5),
    "an attribute more": lambda m: object.__setattr__(block(m), "_fused", None),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen(change):
    model = random_model()
    guard = ParameterGuard(model)
    assert guard.unchanged()
    change(model)
    assert not guard.unchanged()
    assert ParameterGuard(model).unchanged()


def test_computing_changes_nothing():
    model = random_model()
    guard = ParameterGuard(model.model)
    mx.eval(model(mx.array([[1, 2, 3]]), model.make_cache(1)))
    assert guard.unchanged()


def test_a_guard_does_not_keep_its_model_alive():
    """A guard of the inner module is no reference cycle: memory is freed at once."""
    model = random_model()
    object.__setattr__(model, "_decoder", (ParameterGuard(model.model), None))
    gone = weakref.ref(model.model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()
