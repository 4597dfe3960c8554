"""The layers stay MLX's own for whatever quantizes, adapts or saves them."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.assertions import relative_error
from helpers.models import golden_model
from helpers.random_models import CONFIG, TOKENS, random_model, read
from mlx.utils import tree_flatten

from mlx_rgemma import Model
from mlx_rgemma.cpu import dequantize
from mlx_rgemma.cpu.layers import (
    Embedding,
    Linear,
    QuantizedEmbedding,
    QuantizedLinear,
    replace_linear_layers,
)
from mlx_rgemma.errors import UserError
from mlx_rgemma.ops import backend

STEPS = (1,) * TOKENS.shape[1]


@pytest.fixture
def quantized() -> Model:
    model = random_model({"group_size": 32, "bits": 4})
    replace_linear_layers(model)
    return model


def test_quantizing_keeps_the_classes():
    model = random_model()
    replace_linear_layers(model)
    nn.quantize(model, group_size=32, bits=8)
    kinds = {type(m) for _, m in model.named_modules() if "scales" in m}
    assert kinds == {QuantizedLinear, QuantizedEmbedding}
    model.fuse_projections()
    assert relative_error(read(model, STEPS), np.array(model(TOKENS))) < 1e-5


def test_a_new_model_has_exactly_mlx_classes():
    kinds = {type(m) for m in random_model().modules() if isinstance(m, (nn.Linear, nn.Embedding))}
    assert kinds == {nn.Linear, nn.Embedding}


def test_mlx_lms_adapters_wrap_the_layers():
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model = golden_model("tiny-2b")
    replace_linear_layers(model)
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), {"rank": 2, "scale": 2.0, "dropout": 0.0})
    wrapped = [m for _, m in model.named_modules() if type(m).__name__ == "LoRALinear"]
    assert wrapped and all(type(m.linear) is Linear for m in wrapped)
    assert all(type(m.fuse()) is nn.Linear for m in wrapped)


def test_an_embedding_multiplies_with_its_rows():
    table = Embedding(10, 4)
    x = mx.random.normal((3, 4))
    assert relative_error(table.as_linear(x), np.array(x) @ np.array(table.weight).T) < 1e-6
    assert type(nn.QuantizedEmbedding.from_embedding(Embedding(10, 64), 32, 4)) is not Embedding


@pytest.mark.parametrize("joined", [True, False], ids=["joined", "apart"])
def test_dequantized_weights_change_neither_results_nor_parameters(quantized, joined):
    before = {name: np.array(value) for name, value in tree_flatten(quantized.parameters())}
    expected = np.array(quantized(TOKENS))
    if joined:
        quantized.fuse_projections()
        backend.prepare(quantized, dequantize=False)
    layers = [m for _, m in quantized.named_modules() if "scales" in m]
    taken = dequantize.cache_dequantized(quantized)
    assert taken == sum(layer.dequantized.nbytes for layer in layers)
    after = dict(tree_flatten(quantized.parameters()))
    assert after.keys() == before.keys()
    assert all(np.array_equal(after[name], before[name]) for name in before)
    assert relative_error(quantized(TOKENS), expected) < 1e-5
    assert relative_error(read(quantized, STEPS), expected) < 1e-5
    block = quantized.layers[0].mlp_block
    assert block.gate_proj.dequantized is not None
    if joined:
        joint = np.array(block._fused.layer.dequantized, copy=False)
        assert np.shares_memory(joint, np.array(block.gate_proj.dequantized, copy=False))


def test_dequantized_weights_serve_only_the_weights_they_came_from(quantized):
    dequantize.cache_dequantized(quantized)
    layer = quantized.layers[0].mlp_block.down_proj
    layer.weight = mx.zeros_like(layer.weight)
    assert layer.dequantized is None
    x = mx.ones((1, CONFIG.intermediate_size // 2))
    zero = nn.QuantizedLinear.__call__(layer, x)
    assert relative_error(layer(x), np.array(zero)) < 1e-6


def test_weights_are_not_dequantized_where_that_is_not_wanted_or_too_large(quantized, monkeypatch):
    monkeypatch.setenv(dequantize.VARIABLE, "off")
    assert dequantize.cache_dequantized(quantized) == 0
    monkeypatch.setenv(dequantize.VARIABLE, "auto")
    with monkeypatch.context() as patch:
        patch.setattr(dequantize, "available_memory", lambda: 100_000)
        assert dequantize.cache_dequantized(quantized) == 0
    assert quantized.layers[0].mlp_block.down_proj.dequantized is None
    assert dequantize.cache_dequantized(quantized) > 50_000
    monkeypatch.setenv(dequantize.VARIABLE, "maybe")
    with pytest.raises(UserError, match="found 'maybe', expected one of auto, off"):
        dequantize.cache_dequantized(quantized)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradients_do_not_depend_on_the_mode(training):
    """A model in evaluation mode is not frozen."""
    tokens = mx.array([[3, 5, 7, 2, 9, 4]])

    def gradients(model):
        model.train(training)
        return nn.value_and_grad(model, lambda m: mx.square(m(tokens)).mean())(model)[1]

    with backend.use(backend.Backend.MLX):
        expected = dict(tree_flatten(gradients(golden_model("tiny-2b"))))
    found = dict(tree_flatten(gradients(golden_model("tiny-2b"))))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_error(found[name], np.array(value)) < 1e-4, name


def test_a_frozen_layer_has_no_gradient():
    model = golden_model("tiny-2b")
    model.freeze()
    model.layers[0].mlp_block.down_proj.unfreeze()
    found = nn.value_and_grad(model, lambda m: m(mx.array([[3, 5, 7, 2]])).sum())(model)[1]
    assert {name for name, _ in tree_flatten(found)} == {
        "model.layers.0.mlp_block.down_proj.weight",
        "model.layers.0.mlp_block.down_proj.bias",
    }
