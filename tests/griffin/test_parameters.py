"""The table of parameters covers every parameter of the model, in every form."""

from __future__ import annotations

from dataclasses import replace

import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlx_rgemma import GriffinConfig, Model
from mlx_rgemma.adapters.files import AdapterConfig, add_adapters
from mlx_rgemma.griffin.config import SHAPES
from mlx_rgemma.griffin.parameters import (
    MATRICES,
    MODULES,
    Role,
    find_module,
    is_matrix,
    shard_axis,
    uses_weight_decay,
)


@pytest.fixture
def model() -> Model:
    config: GriffinConfig = replace(SHAPES["micro"], attention_bias=True)
    return Model(config)


def test_every_parameter_has_a_role(model):
    found = {name.split(".")[-2] for name, _ in tree_flatten(model.parameters())}
    assert found == set(MODULES)


def test_matrices_are_the_weights_that_mlx_can_quantize(model):
    quantizable = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if hasattr(module, "to_quantized")
    }
    parameters = [name for name, _ in tree_flatten(model.parameters())]
    assert {name for name in parameters if is_matrix(name)} == quantizable


def test_adapters_and_quantized_matrices_keep_the_role_of_their_module(model):
    nn.quantize(model, 64, 4, class_predicate=lambda path, _: path.endswith("down_proj"))
    add_adapters(model, AdapterConfig(num_layers=-1, gates=True))
    for name, value in tree_flatten(model.parameters()):
        role = find_module(name).role
        if "lora" in name:
            assert uses_weight_decay(name, value.ndim) == (role is not Role.RG_LRU)
        if name.endswith((".scales", ".biases")):
            assert role in MATRICES


def test_a_bias_is_split_with_the_outputs_only():
    assert shard_axis("model.layers.0.mlp_block.gate_proj.bias") == 0
    assert shard_axis("model.layers.0.mlp_block.down_proj.bias") is None
    assert shard_axis("model.layers.0.mlp_block.down_proj.biases") == 1
    assert shard_axis("model.layers.2.temporal_block.k_proj.weight") is None
