"""What a checkpoint must hold: exactly the tensors of its configuration."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from helpers.checkpoint_files import CONFIG, SINGLE, edit_json, edit_tensors, golden_copy
from helpers.models import GOLDEN
from mlx.utils import tree_flatten

from mlx_rgemma import GriffinConfig, Model
from mlx_rgemma.checkpoints.convert import convert
from mlx_rgemma.checkpoints.formats.huggingface import CheckpointFolder
from mlx_rgemma.checkpoints.schema import check_contents, expected_tensors
from mlx_rgemma.errors import CheckpointError

NORM = "model__final_norm__weight"
CONV = "model__layers__0__temporal_block__conv_1d__weight"
QUANTIZED = "model__embed_tokens"

CONFIGS = {
    "golden": {},
    "wide recurrence": {"lru_width": 120},
    "wide heads": {"head_dim": 32},
    "attention bias": {"attention_bias": True},
    "no attention": {"block_types": ["recurrent"], "_block_types": None},
    "attention only": {"block_types": ["attention"], "_block_types": None},
    "two taps": {"conv1d_width": 2},
    "cut short": {"num_hidden_layers": 8},
}


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_expected_tensors_are_the_model_s(tmp_path, changes):
    folder = golden_copy("tiny-2b", tmp_path)
    edit_json(folder / CONFIG, **changes)
    config = GriffinConfig.from_dict(CheckpointFolder.open(folder).values)
    parameters = {n: v.shape for n, v in tree_flatten(Model(config).parameters())}
    assert {wanted.name: wanted.shape for wanted in expected_tensors(config)} == parameters


@pytest.mark.parametrize("preset", ["2b", "9b"])
def test_released_sizes(preset):
    config = GriffinConfig.preset(preset)
    parameters = sum(wanted.size for wanted in expected_tensors(config))
    assert round(parameters / 1e9, 3 if preset == "2b" else 2) == {"2b": 2.683, "9b": 8.58}[preset]


def drop(*names):
    return dict.fromkeys(names)


WRONG = {
    "missing": (drop(NORM), "1 tensor missing: model.final_norm.weight"),
    "several missing": (
        drop(*(f"model__layers__0__mlp_block__{p}__bias" for p in ("gate_proj", "up_proj"))),
        "2 tensors missing: model.layers.0.mlp_block.gate_proj.bias, model.layers.0",
    ),
    "surplus": ({"model__extra": mx.zeros(3)}, "1 tensor surplus: model.extra"),
    "many surplus": (
        {f"x{i}": mx.zeros(3) for i in range(8)},
        "8 tensors surplus: x0, x1, x2, x3, x4 and 3 more",
    ),
    "unprintable": ({"a\nb": mx.zeros(1)}, r"surplus: a\\nb"),
    "layer too many": (
        {"model__layers__5__temporal_pre_norm__weight": mx.zeros(80)},
        "surplus: model.layers.5.temporal_pre_norm.weight",
    ),
    "misshapen": (
        {NORM: mx.zeros(81)},
        r"1 tensor misshapen: model.final_norm.weight \(\[81\], expected \[80\]\)",
    ),
    "convolution misshapen": (
        {CONV: mx.zeros((4, 80, 1))},
        r"conv_1d.weight \(\[4, 80, 1\], expected \[80, 4, 1\]\)",
    ),
    "integers": (
        {NORM: mx.zeros(80, mx.int32)},
        r"of the wrong dtype: model.final_norm.weight \(I32, expected F32 or BF16 or F16\)",
    ),
    "several kinds": (
        {NORM: mx.zeros(81), "model__extra": mx.zeros(1)},
        "surplus: model.extra; 1 tensor misshapen",
    ),
    "another head": (
        {"lm_head__weight": mx.zeros((97, 80), mx.bfloat16)},
        "lm_head.weight differs from model.embed_tokens.weight",
    ),
    "a head of another shape": ({"lm_head__weight": mx.zeros((97, 8))}, "lm_head.weight differs"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_wrong_tensors(tmp_path, changes, message):
    folder = golden_copy("tiny-2b", tmp_path)
    edit_tensors(folder / SINGLE, **changes)
    with pytest.raises(CheckpointError, match=message) as error:
        check_contents(CheckpointFolder.open(folder))
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_more_layers_than_tensors(tmp_path):
    folder = golden_copy("tiny-2b", tmp_path)
    edit_json(folder / CONFIG, num_hidden_layers=4000)
    with pytest.raises(CheckpointError, match="num_hidden_layers is 4000, but"):
        check_contents(CheckpointFolder.open(folder))


def test_redundant_head():
    contents = check_contents(CheckpointFolder.open(GOLDEN / "tiny-9b"))
    assert contents.redundant == ("lm_head.weight",)
    assert "lm_head.weight" not in {wanted.name for wanted in contents.expected}


@pytest.fixture
def quantized(tmp_path):
    """A quantized checkpoint, 64 wide: everything in it is quantized."""
    convert(
        GOLDEN / "tiny-sharded", tmp_path / "quantized", quantize=True, q_group_size=32, q_bits=4
    )
    return tmp_path / "quantized"


def test_quantized(quantized):
    contents = check_contents(CheckpointFolder.open(quantized))
    assert len(contents.quantized) == sum(wanted.matrix for wanted in contents.expected)
    assert {(q.bits, q.group_size, q.mode) for q in contents.quantized.values()} == {
        (4, 32, "affine")
    }


def test_redundant_quantized_head(quantized):
    parts = mx.load(str(quantized / SINGLE))
    head = {
        f"lm_head__{part}": parts[f"model.embed_tokens.{part}"]
        for part in ("weight", "scales", "biases")
    }
    mx.eval(list(head.values()))
    edit_tensors(quantized / SINGLE, **head)
    (quantized / "model.safetensors.index.json").unlink()
    contents = check_contents(CheckpointFolder.open(quantized))
    assert len(contents.redundant) == 3
    edit_tensors(quantized / SINGLE, lm_head__weight=lambda weight: weight[:, :-1])
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs .* convert the unquant"):
        check_contents(CheckpointFolder.open(quantized))
    edit_tensors(quantized / SINGLE, lm_head__weight=head["lm_head__weight"])
    edit_tensors(quantized / SINGLE, lm_head__scales=lambda scales: scales + 1)
    with pytest.raises(CheckpointError, match=r"lm_head\.scales differs"):
        check_contents(CheckpointFolder.open(quantized))


MISPACKED = {
    "scales of other rows": (
        {f"{QUANTIZED}__scales": lambda s: s[:-1]},
        r"model.embed_tokens \(weight U32 \[101, 8\], scales BF16 \[100, 2\], for \[101, 64\]\)",
    ),
    "no biases": (drop(f"{QUANTIZED}__biases"), "its biases do not fit affine"),
    "biases of another shape": (
        {f"{QUANTIZED}__biases": lambda b: b[:, :1]},
        "its biases do not fit affine",
    ),
    "weight of another width": (
        {f"{QUANTIZED}__weight": lambda w: w[:, :-1]},
        r"weight U32 \[101, 7\]",
    ),
    "weight not packed": (
        {f"{QUANTIZED}__weight": lambda w: w.astype(mx.float32)},
        "weight F32",
    ),
    "whole scales": ({f"{QUANTIZED}__scales": lambda s: s.astype(mx.int32)}, "scales I32"),
    "weight missing": (drop(f"{QUANTIZED}__weight"), "missing: model.embed_tokens.weight"),
}


@pytest.mark.parametrize(("changes", "message"), MISPACKED.values(), ids=MISPACKED)
def test_mispacked(quantized, changes, message):
    (quantized / "model.safetensors.index.json").unlink()
    edit_tensors(quantized / SINGLE, **changes)
    with pytest.raises(CheckpointError, match=message):
        check_contents(CheckpointFolder.open(quantized))


def test_quantized_against_its_config(quantized):
    section = {"group_size": 32, "bits": 4, "mode": "affine"}
    path = "model.layers.0.mlp_block.up_proj"
    for settings, message in (
        ({**section, path: {"group_size": 32, "bits": 8}}, rf"{path} \(differs from config.json\)"),
        ({**section, path: False}, rf"{path} \(differs from config.json\)"),
        ({**section, path: {"group_size": None}}, rf"{path} \(differs from config.json\)"),  # 64
        ({**section, path: {"mode": None}}, rf"{path} \(differs from config.json\)"),
        (None, "config.json has no 'quantization'"),
    ):
        edit_json(quantized / CONFIG, quantization=settings, quantization_config=settings)
        with pytest.raises(CheckpointError, match=message):
            check_contents(CheckpointFolder.open(quantized))
    settings = {**section, path: {"group_size": 32, "bits": None, "mode": "affine"}}  # 4 bits
    edit_json(quantized / CONFIG, quantization=settings, quantization_config=settings)
    check_contents(CheckpointFolder.open(quantized))
    # As mlx-lm reads it: what the file holds counts, not the default.
    edit_json(quantized / CONFIG, quantization={"group_size": 64, "bits": 8})
    assert len(check_contents(CheckpointFolder.open(quantized)).quantized) > 1


def test_convolution_layouts(tmp_path):
    """Hugging Face's layout and MLX's are told apart by the shape."""
    folder = golden_copy("tiny-2b", tmp_path)
    hugging_face = np.array(
        mx.load(str(folder / SINGLE))[CONV.replace("__", ".")].astype(mx.float32)
    )
    assert hugging_face.shape == (80, 1, 4)
    check_contents(CheckpointFolder.open(folder))
    edit_tensors(folder / SINGLE, **{CONV: lambda w: w.moveaxis(2, 1)})
    check_contents(CheckpointFolder.open(folder))
