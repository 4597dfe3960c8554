"""Every spelling of the released configs is read; what cannot be is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from helpers.models import GOLDEN, MODELS

from mlx_rgemma import GriffinConfig
from mlx_rgemma.errors import ConfigError


def config(**changes):
    values = json.loads((GOLDEN / "tiny-9b" / "config.json").read_text())
    for key, value in changes.items():
        if value is ...:
            values.pop(key, None)
        else:
            values[key] = value
    return values


@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name):
    values = json.loads((GOLDEN / name / "config.json").read_text())
    read = GriffinConfig.from_dict(values)
    assert GriffinConfig.from_dict(read.to_dict()) == read


@pytest.mark.parametrize(
    ("changes", "attribute", "expected"),
    [
        ({"block_types": ..., "_block_types": ["recurrent"]}, "block_types", ("recurrent",)),
        ({"_block_types": ["recurrent"]}, "block_types", ("recurrent", "recurrent", "attention")),
        ({"block_types": None, "_block_types": ["attention"]}, "block_types", ("attention",)),
        ({"block_types": ...}, "block_types", ("recurrent", "recurrent", "attention")),
        ({"rope_theta": 500.0}, "rope_theta", 500.0),
        ({"rope_theta": ..., "rope_parameters": {"rope_theta": 7.0}}, "rope_theta", 7.0),
        ({"rope_theta": 3.0, "rope_parameters": {"rope_theta": 7.0}}, "rope_theta", 7.0),
        ({"rope_theta": 3, "rope_parameters": {"rope_type": "default"}}, "rope_theta", 3.0),
        ({"rope_theta": ...}, "rope_theta", 10000.0),
        ({"rope_scaling": {"type": "default"}}, "rope_theta", 10000.0),
        ({"rope_scaling": None, "rope_parameters": {"type": "default"}}, "rope_theta", 10000.0),
        ({"torch_dtype": "torch.bfloat16"}, "dtype", "bfloat16"),
        ({"torch_dtype": "float32", "dtype": "float16"}, "dtype", "float16"),
        ({"torch_dtype": ...}, "dtype", None),
        ({"embeddings_scale_by_sqrt_dim": ...}, "embeddings_scale_by_sqrt_dim", True),
        ({"embeddings_scale_by_sqrt_dim": False}, "embeddings_scale_by_sqrt_dim", False),
        ({"lru_width": ...}, "lru_width", 48),
        ({"lru_width": None}, "lru_width", 48),
        ({"lru_width": 96}, "lru_width", 96),
        ({"logits_soft_cap": 0}, "logits_soft_cap", 0.0),
        ({"logits_soft_cap": None}, "logits_soft_cap", 0.0),
        ({"logits_soft_cap": ...}, "logits_soft_cap", 30.0),
        ({"eos_token_id": [1, 107]}, "eos_token_ids", (1, 107)),
        ({"num_hidden_layers": 1}, "layer_types", ("recurrent",)),
        ({"attention_window_size": 12.0}, "attention_window_size", 12),
        ({"window": "hf"}, "past_window", 11),
    ],
    ids=str,
)
def test_spellings(changes, attribute, expected):
    assert getattr(GriffinConfig.from_dict(config(**changes)), attribute) == expected


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"model_type": "llama"}, "model_type"),
        ({"model_type": ...}, "model_type"),
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"lru_width": 70}, "num_attention_heads is 3, which does not divide lru_width"),
        ({"block_types": ["recurrent", "mamba"]}, "block_types holds 'mamba'"),
        ({"block_types": []}, "block_types"),
        ({"block_types": "recurrent"}, "block_types"),
        ({"attention_window_size": 0}, "attention_window_size"),
        ({"attention_window_size": -4}, "attention_window_size"),
        ({"attention_window_size": ...}, "attention_window_size is missing"),
        ({"attention_window_size": "2048"}, "attention_window_size"),
        ({"attention_window_size": True}, "attention_window_size"),
        ({"hidden_size": ...}, "hidden_size is missing"),
        ({"hidden_size": 48.5}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"intermediate_size": 127}, "intermediate_size"),
        ({"conv1d_width": 0}, "conv1d_width"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"logits_soft_cap": -1}, "logits_soft_cap"),
        ({"logits_soft_cap": float("nan")}, "logits_soft_cap"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": 0.1}, "rope_theta"),  # more than a turn a position
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type"),
        ({"rope_parameters": {"type": "linear"}}, r"rope_parameters\.type is 'linear'"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, r"rope_scaling\.type is 'linear'"),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear"}},
            r"rope_scaling\.type is 'linear'",
        ),
        ({"rope_scaling": {"type": "default", "rope_type": "llama3"}}, "rope_type is 'llama3'"),
        ({"rope_parameters": 3}, "rope_parameters"),
        ({"partial_rotary_factor": 0.01}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 2}, "partial_rotary_factor"),
        ({"hidden_activation": "relu"}, "hidden_activation"),
        ({"torch_dtype": "int8"}, "torch_dtype"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"quantization": {"quant_method": "gptq"}}, "quantization"),
        ({"eos_token_id": "1"}, "eos_token_id"),
        ({"window": "wide"}, "window"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(changes, key):
    with pytest.raises(ConfigError, match=key) as error:
        GriffinConfig.from_dict(config(**changes))
    assert "\n" not in str(error.value)


SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "lru_width",
    "attention_window_size",
    "conv1d_width",
)
CONSTANTS = ("logits_soft_cap", "rope_theta", "partial_rotary_factor", "rms_norm_eps")
TOKENS = ("bos_token_id", "pad_token_id", "eos_token_id")
WRONG_SIZES = (0, -1, 2**31, 2**40, 2**63, 10**400, 1.5, 1e300, "7", [7], {"a": 7}, True)
WRONG_CONSTANTS = (-1.0, 1e-44, 1e39, 1e300, 10**400, float("inf"), float("nan"), "7", [7], True)
WRONG_TOKENS = (-1, 2**31, 10**400, 1.5, "1", [[1]], True)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, value) for key in SIZES for value in WRONG_SIZES),
        *((key, value) for key in CONSTANTS for value in WRONG_CONSTANTS),
        *((key, value) for key in TOKENS for value in WRONG_TOKENS),
        ("eos_token_id", [1, -1]),
        ("eos_token_id", [1] * 10_000),
        ("block_types", ["recurrent"] * 10_000),
        # in range by themselves, but arrays of the product cannot be indexed with int32
        ("vocab_size", 1 << 24),
        ("intermediate_size", 1 << 22),
        ("attention_window_size", 1 << 30),
    ],
    ids=lambda value: str(value)[:20],
)
def test_every_number_has_a_type_and_a_range(key, value):
    with pytest.raises(ConfigError) as error:
        GriffinConfig.from_dict(config(**{"hidden_size": 768, "lru_width": 768, key: value}))
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize("key", [*SIZES, *CONSTANTS])
@pytest.mark.parametrize("value", [None, "7", 2**60, -1])
def test_the_constructor_checks_too(key, value):
    with pytest.raises(ConfigError, match=key):
        replace(GriffinConfig.from_dict(config()), **{key: value})


@pytest.mark.parametrize(
    "key",
    [
        "model_type",
        "hidden_activation",
        "hidden_size",
        "rms_norm_eps",
        "eos_token_id",
        "torch_dtype",
        "block_types",
        "rope_parameters",
        "num_key_value_heads",
        "attention_bias",
        "window",
    ],
)
@pytest.mark.parametrize("value", ["x" * 100_000, [["x" * 1000] * 100], [[]]], ids=len)
def test_messages_are_short_whatever_the_file_holds(key, value):
    with pytest.raises(ConfigError) as error:
        GriffinConfig.from_dict(config(**{key: value}))
    assert len(str(error.value)) < 300


def test_not_an_object():
    with pytest.raises(ConfigError, match="JSON object"):
        GriffinConfig.from_dict([1, 2])


def test_presets_have_the_released_shapes():
    two, nine = GriffinConfig.preset("2b"), GriffinConfig.preset("9b")
    assert (two.layer_types.count("recurrent"), two.layer_types.count("attention")) == (18, 8)
    assert (nine.layer_types.count("recurrent"), nine.layer_types.count("attention")) == (26, 12)
    assert two.head_dim == nine.head_dim == 256
    assert two.rotary_dims == 128
    with pytest.raises(ConfigError, match="preset"):
        GriffinConfig.preset("7b")


@pytest.mark.parametrize(("preset", "billions"), [("2b", 2.683), ("9b", 8.58)])
def test_presets_have_the_released_sizes(preset, billions):
    from mlx.utils import tree_flatten

    from mlx_rgemma import Model

    model = Model(GriffinConfig.preset(preset))  # lazy: no weight is ever computed
    count = sum(v.size for _, v in tree_flatten(model.parameters()))
    assert abs(count / 1e9 - billions) < 0.006
