"""Joint projections: the same numbers, nothing stored twice, gone when a layer is replaced."""

from __future__ import annotations

import copy

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.assertions import LOGITS_ATOL, max_error
from helpers.models import golden, golden_model
from mlx.utils import tree_flatten

from mlx_rgemma.griffin.fused_projection import FusedProjection


def decode(model, tokens: mx.array) -> np.ndarray:
    cache = model.make_cache(tokens.shape[0])
    steps = [model(tokens[:, t : t + 1], cache=cache) for t in range(tokens.shape[1])]
    return np.array(mx.concatenate(steps, axis=1))


@pytest.fixture
def products(monkeypatch):
    """Counts the joint products that run."""
    calls = []
    run = FusedProjection.__call__
    monkeypatch.setattr(
        FusedProjection, "__call__", lambda self, x: (calls.append(1), run(self, x))[1]
    )
    return calls


def test_decoding_is_the_same_with_and_without(model_name, products):
    tokens = mx.array(golden(f"decode/{model_name}.npz")["tokens"])[:, :20]
    expected = decode(golden_model(model_name, fuse=False), tokens)
    assert not products
    model = golden_model(model_name)
    assert max_error(decode(model, tokens), expected) < LOGITS_ATOL
    assert len(products) == 20 * 2 * len(model.layers)


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_nothing_is_stored_twice(bits):
    model = golden_model("tiny-sharded", fuse=False)
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
        mx.eval(model.parameters())
    mx.clear_cache()
    before = mx.get_active_memory()
    parameters = {k: np.array(v) for k, v in tree_flatten(model.parameters())}
    model.fuse_projections()
    mx.clear_cache()
    assert mx.get_active_memory() - before < 16_000  # pages' ends; the weights are 470,000
    after = dict(tree_flatten(model.parameters()))
    assert after.keys() == parameters.keys()
    for name, value in parameters.items():
        assert np.array_equal(np.array(after[name]), value), name


@pytest.mark.parametrize(("bits", "mode"), [(8, "affine"), (4, "affine"), (4, "mxfp4")])
def test_quantized_layers_are_joined(bits, mode, products):
    tokens = mx.array([[5, 6, 7, 8]])
    outputs = []
    for fuse in (False, True):
        model = golden_model("tiny-sharded", fuse=False)
        nn.quantize(model, group_size=32, bits=bits, mode=mode)
        if fuse:
            model.fuse_projections()
        outputs.append(decode(model, tokens))
    assert products
    assert max_error(outputs[1], outputs[0]) < LOGITS_ATOL


def test_a_replaced_layer_is_heard(products):
    """New weights count at once, whether set by training, by hand or by an adapter."""
    model = golden_model("tiny-2b")
    tokens = mx.array([[5, 6, 7]])
    old = decode(model, tokens)
    products.clear()
    block = model.layers[0].mlp_block
    block.gate_proj.weight = block.gate_proj.weight * 1.5
    new = decode(model, tokens)
    assert len(products) == 3 * (2 * len(model.layers) - 1)
    assert max_error(new, old) > 0.01
    unfused = golden_model("tiny-2b", fuse=False)
    unfused.layers[0].mlp_block.gate_proj.weight = block.gate_proj.weight
    assert max_error(new, decode(unfused, tokens)) < LOGITS_ATOL


def test_training_frees_the_joint_arrays():
    """Only where their parts are trained; adapters go on with the joined ones."""
    for trained in (False, True):
        model = golden_model("tiny-2b")
        model.train()
        if not trained:
            model.freeze()
        model(mx.array([[5, 6, 7]]))
        blocks = [b for layer in model.layers for b in (layer.temporal_block, layer.mlp_block)]
        assert all(("_fused" in vars(block)) != trained for block in blocks)
        model.eval()
        decode(model, mx.array([[5, 6]]))


def test_layers_that_differ_are_left_alone(products):
    model = golden_model("tiny-sharded", fuse=False)
    nn.quantize(model, 32, 8, class_predicate=lambda path, _: path.endswith(("q_proj", "up_proj")))
    model.fuse_projections()
    decode(model, mx.array([[5, 6]]))
    recurrent = model.args.layer_types.count("recurrent")
    assert len(products) == 2 * recurrent  # linear_y and linear_x only


def test_a_copy_of_a_model_is_fused_too(products):
    model = copy.deepcopy(golden_model("tiny-2b"))
    decode(model, mx.array([[5]]))
    assert len(products) == 2 * len(model.layers)
