"""The layers stay MLX's own for whatever quantizes, adapts or saves them."""

from __future__ import annotations

import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import ON_GPU, golden_model, relative_error
from mlx.utils import tree_flatten
from random_models import CONFIG, TOKENS, random_model, read

from mlx_rgemma import Model
from mlx_rgemma.errors import UserError
from mlx_rgemma.griffin import expansion
from mlx_rgemma.griffin.linear import Embedding, Linear, QuantizedEmbedding, QuantizedLinear

STEPS = (1,) * TOKENS.shape[1]


@pytest.fixture
def quantized() -> Model:
    model = random_model({"group_size": 32, "bits": 4})
    model.adopt_layers()
    return model


def test_quantizing_keeps_the_classes():
    model = random_model()
    model.adopt_layers()
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
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), {"rank": 2, "scale": 2.0, "dropout": 0.0})
    wrapped = [m for _, m in model.named_modules() if type(m).__name__ == "LoRALinear"]
    assert wrapped and all(type(m.linear) is Linear for m in wrapped)
    assert all(type(m.fuse()) is nn.Linear for m in wrapped)


def test_a_gradient_lies_as_its_weight_does():
    layer = Linear(6, 4)
    weight = mx.array(np.arange(24, dtype=np.float32).reshape(4, 6))
    layer.weight = weight
    x = mx.array(np.arange(12, dtype=np.float32).reshape(2, 6))
    gradient = nn.value_and_grad(layer, lambda x: layer(x).sum())(x)[1]["weight"]
    assert np.array(gradient, copy=False).strides == (24, 4)
    assert gradient.tolist() == [x.sum(axis=0).tolist()] * 4


def test_an_embedding_multiplies_with_its_rows():
    table = Embedding(10, 4)
    x = mx.random.normal((3, 4))
    assert relative_error(table.as_linear(x), np.array(x) @ np.array(table.weight).T) < 1e-6
    assert type(nn.QuantizedEmbedding.from_embedding(Embedding(10, 64), 32, 4)) is not Embedding


ON_LINUX_CPU = pytest.mark.skipif(
    ON_GPU or not sys.platform.startswith("linux"), reason="expanded on a Linux CPU only"
)


@ON_LINUX_CPU
def test_tiles_are_those_of_the_weights_that_a_layer_has():
    layer = Linear(32, 128)
    layer.eval()
    x = mx.random.normal((2, 32))

    def expected():
        return np.array(x) @ np.array(layer.weight).T + np.array(layer.bias)

    assert relative_error(layer(x), expected()) < 1e-6
    layer.weight = layer.weight + 1.0
    assert relative_error(layer(x), expected()) < 1e-6
    assert layer.__dict__["_tiles"][0] is layer.weight
    assert set(layer.parameters()) == {"weight", "bias"}
    layer.train()
    assert relative_error(layer(x), expected()) < 1e-6
    assert "_tiles" not in layer.__dict__  # an optimizer would make them stale at every step
    gradient = nn.value_and_grad(layer, lambda x: layer(x).sum())(x)[1]["weight"]
    assert relative_error(gradient, np.array([x.sum(axis=0).tolist()] * 128)) < 1e-6


@ON_LINUX_CPU
def test_decode_steps_read_joint_weights_in_tiles():
    model = random_model()
    model.fuse_projections()
    model.eval()
    read(model, STEPS)
    joints = [layer.mlp_block._fused.joint for layer in model.layers]
    assert all(joint.__dict__["_tiles"][0] is joint.weight for joint in joints)
    apart = [layer.mlp_block.gate_proj for layer in model.layers]
    assert not any("_tiles" in layer.__dict__ for layer in apart)  # once is enough


@ON_LINUX_CPU
@pytest.mark.parametrize("joined", [True, False], ids=["joined", "apart"])
def test_expanded_weights_change_neither_results_nor_parameters(quantized, joined):
    before = {name: np.array(value) for name, value in tree_flatten(quantized.parameters())}
    expected = np.array(quantized(TOKENS))
    if joined:
        quantized.fuse_projections()
    layers = [m for _, m in quantized.named_modules() if "scales" in m]
    taken = quantized.expand_quantized()
    assert taken == quantized.expanded_nbytes == sum(layer.expanded.nbytes for layer in layers)
    after = dict(tree_flatten(quantized.parameters()))
    assert after.keys() == before.keys()
    assert all(np.array_equal(after[name], before[name]) for name in before)
    assert relative_error(quantized(TOKENS), expected) < 1e-5
    assert relative_error(read(quantized, STEPS), expected) < 1e-5
    block = quantized.layers[0].mlp_block
    assert block.gate_proj.expanded is not None
    if joined:
        joint = np.array(block._fused.joint.expanded, copy=False)
        assert np.shares_memory(joint, np.array(block.gate_proj.expanded, copy=False))


@ON_LINUX_CPU
def test_expanded_weights_serve_only_the_weights_they_came_from(quantized):
    quantized.expand_quantized()
    layer = quantized.layers[0].mlp_block.down_proj
    layer.weight = mx.zeros_like(layer.weight)
    assert layer.expanded is None
    x = mx.ones((1, CONFIG.intermediate_size // 2))
    zero = nn.QuantizedLinear.__call__(layer, x)
    assert relative_error(layer(x), np.array(zero)) < 1e-6


@ON_LINUX_CPU
def test_weights_are_not_expanded_where_that_is_not_wanted_or_too_large(quantized, monkeypatch):
    monkeypatch.setenv(expansion.VARIABLE, "off")
    assert quantized.expand_quantized() == 0
    monkeypatch.setenv(expansion.VARIABLE, "auto")
    with monkeypatch.context() as patch:
        patch.setattr(expansion, "available_memory", lambda: 100_000)
        assert quantized.expand_quantized() == 0
    assert quantized.layers[0].mlp_block.down_proj.expanded is None
    assert quantized.expand_quantized() > 50_000
    monkeypatch.setenv(expansion.VARIABLE, "maybe")
    with pytest.raises(UserError, match="found 'maybe', expected one of auto, off"):
        quantized.expand_quantized()
