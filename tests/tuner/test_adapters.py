"""Adapter files: what fits loads, what does not is refused in one line; fusing changes nothing."""

from __future__ import annotations

import json
import shutil

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.assertions import max_error
from helpers.models import golden_model
from mlx.utils import tree_flatten

from mlx_rgemma import load
from mlx_rgemma.adapters.files import (
    AdapterConfig,
    add_adapters,
    load_adapters,
    save_adapter_config,
    save_adapter_weights,
)
from mlx_rgemma.adapters.gates import LoRAGates
from mlx_rgemma.errors import UserError
from mlx_rgemma.tuner.fuse import fuse_adapters

TOKENS = mx.array(np.random.default_rng(0).integers(3, 90, (2, 25)))


def randomize(model) -> None:
    """Give adapters values that matter."""
    for name, value in tree_flatten(model.trainable_parameters()):
        noise = 0.05 * mx.random.normal(value.shape).astype(value.dtype)
        model.load_weights([(name, value + noise)], strict=False)


def trained(model, **settings) -> AdapterConfig:
    mx.random.seed(1)
    values = {"lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.0}, "num_layers": -1}
    config = AdapterConfig.of({**values, **settings}, "test")
    add_adapters(model, config)
    randomize(model)
    model.eval()
    return config


@pytest.fixture
def folder(tmp_path):
    """Adapters on all layers and gates of tiny-9b."""
    model = golden_model("tiny-9b")
    trained(model, lora_gates=True)
    save_adapter_weights(
        tmp_path / "adapters.safetensors", dict(tree_flatten(model.trainable_parameters()))
    )
    save_adapter_config(
        tmp_path,
        {
            "fine_tune_type": "lora",
            "num_layers": -1,
            "lora_gates": True,
            "lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.0},
        },
    )
    return tmp_path


def test_round_trip(folder):
    model, expected = golden_model("tiny-9b"), golden_model("tiny-9b")
    plain = np.array(model(TOKENS))
    trained(expected, lora_gates=True)
    assert load_adapters(model, folder).gates
    assert not model.training and not tree_flatten(model.trainable_parameters())
    assert max_error(model(TOKENS), np.array(expected(TOKENS))) == 0.0
    assert max_error(model(TOKENS), plain) > 1e-2


def run_cached(model) -> np.ndarray:
    """Chunks of every size a cache tells apart: many tokens, few, one."""
    cache, at, parts = model.make_cache(2), 0, []
    for size in (12, 5, 1, 1, 6):
        parts.append(np.array(model(TOKENS[:, at : at + size], cache=cache)))
        at += size
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_fused_equals_unfused(kind):
    model = golden_model("tiny-9b")
    trained(model, fine_tune_type=kind, lora_gates=True)
    assert isinstance(model.layers[0].temporal_block.rg_lru, LoRAGates)
    adapted = np.array(model(TOKENS))
    assert max_error(run_cached(model), adapted) < 5e-5
    names = set(dict(tree_flatten(golden_model("tiny-9b").parameters())))
    fuse_adapters(model)
    assert set(dict(tree_flatten(model.parameters()))) == names
    assert max_error(model(TOKENS), adapted) < 5e-5
    assert max_error(run_cached(model), adapted) < 5e-5


def quantized_model() -> nn.Module:
    model = golden_model("tiny-9b", fuse=False)
    nn.quantize(
        model, 32, 8, class_predicate=lambda _, m: hasattr(m, "to_quantized") and _fits(m, 32)
    )
    return model


def _fits(module, group: int) -> bool:
    return module.weight.shape[-1] % group == 0


@pytest.mark.parametrize("dequantize", [False, True])
def test_fusing_on_a_quantized_model(dequantize):
    model = quantized_model()
    trained(model)
    adapted = np.array(model(TOKENS))
    before = sum("scales" in m for _, m in model.named_modules())
    fuse_adapters(model, dequantize=dequantize)
    assert before == 5  # the matrices of tiny-9b whose rows are whole groups
    assert sum("scales" in m for _, m in model.named_modules()) == (0 if dequantize else before)
    # Requantized weights are off by up to half a step of 8 bits.
    assert max_error(model(TOKENS), adapted) < (5e-5 if dequantize else 0.2)


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def lora(**parameters):
    return {"rank": 4, "scale": 2.0, "dropout": 0.0, **parameters}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fine_tune_type": "lore"}, "fine_tune_type is 'lore', expected one of lora, dora, full"),
        ({"num_layers": 77}, "num_layers is 77, but the model has 5 layers; the adapters were"),
        ({"num_layers": "all"}, "num_layers is 'all', expected an integer"),
        ({"num_layers": 1}, "holds .* unknown here"),
        ({"lora_parameters": lora(rank=8)}, "has shape .* the model needs"),
        ({"lora_parameters": lora(rank=0)}, "rank is 0, expected"),
        ({"lora_parameters": lora(scale="big")}, "scale is 'big', expected a number"),
        ({"lora_parameters": {"rank": 4, "alpha": 8}}, "has alpha, expected scale"),
        ({"lora_parameters": lora(dropout=1)}, "dropout is 1, expected"),
        ({"lora_parameters": lora(keys=["q_porj"])}, "the model has no q_porj"),
        ({"lora_gates": False}, "holds .*gate_lora_a, .* unknown here"),
        ({"lora_gates": "yes"}, "lora_gates is 'yes', expected true or false"),
        ({"fine_tune_type": "dora"}, "lacks .*; the adapters were trained on another model"),
        ({"fine_tune_type": "full", "lora_gates": False}, "unknown here"),
        ({"num_layers": 1 << 40}, "num_layers is 1099511627776, expected an integer up to 65536"),
        ({"lora_parameters": lora(rank=99999999999)}, "rank is 99999999999, expected an integer"),
        ({"lora_parameters": lora(rank=60000)}, "rank is 60000, more than any matrix of the model"),
        ({"lora_parameters": lora(rank=10**4000)}, "an integer of more than 256 bits"),
        ({"lora_parameters": lora(scale=float("nan"))}, "scale is nan, expected a number up to"),
        ({"lora_parameters": lora(scale=float("inf"))}, "scale is inf, expected a number up to"),
        ({"lora_parameters": lora(scale=1e30)}, r"scale is 1e\+30, expected a number up to 1e\+06"),
        ({"lora_parameters": lora(dropout=float("nan"))}, "dropout is nan, expected"),
        ({"lora_parameters": lora(keys=["\x1b[2J" * 9999])}, r"the model has no \\x1b\[2J"),
        ({"lora_parameters": lora(keys=[""])}, "lora_parameters"),
        ({"fine_tune_type": "x" * 100_000}, "fine_tune_type is 'xxx"),
        ({"a": "x" * 2_000_000}, "expected at most 1,000,000"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_configurations_that_do_not_fit(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(UserError, match=message) as error:
        load_adapters(golden_model("tiny-9b"), folder)
    assert str(error.value).isprintable() and len(str(error.value)) < 900


def test_a_flipped_bit_is_found(folder):
    weights = folder / "adapters.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match="is damaged: its checksum is"):
        load_adapters(golden_model("tiny-9b"), folder)


def test_adapters_without_checksums_load(folder):
    """As mlx-lm writes them."""
    weights = folder / "adapters.safetensors"
    arrays = mx.load(str(weights))
    mx.eval(arrays)
    mx.save_safetensors(str(weights), arrays)
    assert load_adapters(golden_model("tiny-9b"), folder).rank == 4


def test_damaged_files(folder, tmp_path):
    weights, config = folder / "adapters.safetensors", folder / "adapter_config.json"
    content = weights.read_bytes()
    for damaged, message in (
        (content[:-1], "truncated"),
        (content + b"x", "after the last tensor"),
        (b"PK\x03\x04" + content, "adapters.safetensors"),
        (b"", "adapters.safetensors"),
    ):
        weights.write_bytes(damaged)
        with pytest.raises(UserError, match=message):
            load_adapters(golden_model("tiny-9b"), folder)
    weights.write_bytes(content)
    for text, message in (("{", "not valid JSON"), ("[]", "not a JSON object")):
        config.write_text(text)
        with pytest.raises(UserError, match=message):
            load_adapters(golden_model("tiny-9b"), folder)
    config.unlink()
    with pytest.raises(UserError, match="the adapters are incomplete"):
        load_adapters(golden_model("tiny-9b"), folder)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="no such folder"):
        load_adapters(golden_model("tiny-9b"), folder)


def test_adapters_of_another_model(folder):
    with pytest.raises(UserError, match="the adapters were trained on another model"):
        load_adapters(golden_model("tiny-2b"), folder)


def test_dora_refuses_bits_that_it_miscounts():
    model = golden_model("tiny-9b", fuse=False)
    nn.quantize(
        model, 32, 5, class_predicate=lambda _, m: hasattr(m, "to_quantized") and _fits(m, 32)
    )
    with pytest.raises(UserError, match="5 bits, and DoRA takes 2, 4 or 8"):
        add_adapters(model, AdapterConfig(fine_tune_type="dora", num_layers=-1))


def test_full_training_leaves_what_is_quantized():
    model = quantized_model()
    add_adapters(model, AdapterConfig("full", num_layers=-1))
    trained = {name for name, _ in tree_flatten(model.trainable_parameters())}
    quantized = {name for name, m in model.named_modules() if "scales" in m}
    assert trained and quantized and not {name.rpartition(".")[0] for name in trained} & quantized

    def loss(model):
        return nn.losses.cross_entropy(model(TOKENS[:, :-1]), TOKENS[:, 1:], reduction="mean")

    gradients = dict(tree_flatten(nn.value_and_grad(model, loss)(model)[1]))
    assert set(gradients) == trained
    assert mx.abs(gradients["model.layers.0.temporal_pre_norm.weight"]).max().item() > 0


def test_missing_adapters_are_an_error_before_a_model_is_loaded(tmp_path):
    with pytest.raises(UserError, match="no adapters: no such folder; give a folder that lora"):
        load(tmp_path / "no model", adapter_path=tmp_path / "no adapters")
