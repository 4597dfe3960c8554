"""The layers stay MLX's own for whatever quantizes, adapts or saves them."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from conftest import golden_model, relative_error

from mlx_rgemma import GriffinConfig, Model
from mlx_rgemma.griffin.linear import Embedding, Linear, QuantizedEmbedding, QuantizedLinear


def test_quantizing_keeps_the_classes():
    config = GriffinConfig(
        vocab_size=64,
        hidden_size=64,
        lru_width=64,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=2,
        head_dim=32,
        attention_window_size=8,
    )
    model = Model(config)
    nn.quantize(model, group_size=32, bits=8)
    kinds = {type(m) for _, m in model.named_modules() if "scales" in m}
    assert kinds == {QuantizedLinear, QuantizedEmbedding}
    model.fuse_projections()
    tokens = mx.array([[5, 6, 7, 8, 9, 10, 11]])
    whole = model(tokens)
    cache = model.make_cache()
    steps = [model(tokens[:, i : i + 1], cache=cache) for i in range(7)]
    assert relative_error(mx.concatenate(steps, axis=1), np.array(whole)) < 1e-5


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
