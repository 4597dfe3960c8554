"""Recipes: mlx-lm's own result for its own, and what ours raises."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest
from helpers.checkpoint_files import (
    CONFIG,
    all_tensors,
    assert_same_tensors,
    golden_copy,
    run_plain_python,
)
from mlx.utils import tree_flatten

from mlx_rgemma import GriffinConfig, Model, convert, load, load_model, register
from mlx_rgemma.checkpoints.formats.huggingface import CheckpointFolder
from mlx_rgemma.checkpoints.quantization import MIXED, RECIPES, Quantization, Recipe
from mlx_rgemma.checkpoints.save import save_model
from mlx_rgemma.checkpoints.schema import check_contents
from mlx_rgemma.errors import UserError
from mlx_rgemma.io.hub import EMBEDDED

PLAIN_MIXED = """
import sys, mlx.core as mx, numpy as np
from mlx_lm import load
from mlx_lm.convert import convert
source, target, *recipes = sys.argv[1:]
for recipe in recipes:
    convert(source, f"{target}/{recipe}", quantize=True, quant_predicate=recipe, q_group_size=64)
    folder = f"{target}/{recipe}-default-groups"
    convert(source, folder, quantize=True, quant_predicate=recipe)
    model, tokenizer = load(folder)
    model.set_dtype(mx.float32)
    tokens = mx.array([tokenizer.encode("Once upon a time there was a")])
    np.save(folder + ".npy", np.array(model(tokens)))
"""


@pytest.fixture(scope="module")
def mlx_lm_mixed(tmp_path_factory):
    root = tmp_path_factory.mktemp("mixed")
    run_plain_python(PLAIN_MIXED, EMBEDDED, root, *MIXED)
    return root


@pytest.mark.parametrize("recipe", MIXED)
def test_mixed_recipes_are_mlx_lm_s(mlx_lm_mixed, tmp_path, recipe):
    convert(EMBEDDED, tmp_path / "out", quantize=True, quant_predicate=recipe)
    assert_same_tensors(all_tensors(tmp_path / "out"), all_tensors(mlx_lm_mixed / recipe))
    contents = check_contents(CheckpointFolder.open(tmp_path / "out"))
    low, high = MIXED[recipe]
    assert {how.bits for how in contents.quantized.values()} == {low, high}
    assert contents.quantized["model.embed_tokens"].bits == low


@pytest.mark.parametrize("recipe", MIXED)
def test_mlx_lm_s_mixed_recipes_with_default_groups_load(mlx_lm_mixed, recipe):
    """mlx-lm writes `"group_size": null` for each layer then, which means 64."""
    import mlx_lm.utils
    import numpy as np

    folder = mlx_lm_mixed / f"{recipe}-default-groups"
    section = json.loads((folder / CONFIG).read_text())["quantization"]
    assert section["model.embed_tokens"]["group_size"] is None
    quantized = check_contents(CheckpointFolder.open(folder)).quantized
    assert {(how.bits, how.group_size) for how in quantized.values()} == {
        (bits, 64) for bits in MIXED[recipe]
    }
    model, tokenizer = load(folder, window="hf", dtype="float32")
    tokens = mx.array([tokenizer.encode("Once upon a time there was a")])
    ours, theirs = np.array(model(tokens)), np.load(f"{folder}.npy")
    # mlx-lm rounds the embedding's scale differently, and its norms have another epsilon.
    assert np.abs(ours - theirs).max() < 0.02 * np.abs(ours).max()

    register()
    same, _ = mlx_lm.utils.load_model(folder, model_config={"window": "hf"})
    same.set_dtype(mx.float32)
    assert np.abs(ours - np.array(same(tokens))).max() < 1e-4


@pytest.mark.parametrize("layers", [1, 3, 8, 26, 38])
def test_mixed_recipes_raise_the_layers_that_mlx_lm_raises(layers):
    """Against mlx-lm's own predicate, for models of other depths."""
    from mlx_lm.convert import mixed_quant_predicate_builder

    config = GriffinConfig.from_dict(
        {
            **{"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128},
            **{"num_attention_heads": 2, "num_hidden_layers": layers, "lru_width": 64},
            **{"model_type": "recurrent_gemma", "attention_window_size": 8},
        }
    )
    model = Model(config)
    theirs = mixed_quant_predicate_builder("mixed_3_6", model, 64)
    recipe = Recipe.choose(predicate="mixed_3_6")
    paths = [path for path, module in model.named_modules() if hasattr(module, "to_quantized")]
    found = {path: recipe.of(path, layers).bits for path in paths}
    assert found == {path: theirs(path, None)["bits"] for path in paths}


def test_rgemma_raises_what_feeds_the_state_and_the_embedding(tmp_path):
    made = convert(EMBEDDED, tmp_path / "out", quantize=True)
    quantized = check_contents(CheckpointFolder.open(tmp_path / "out")).quantized
    bits = {}
    for path, how in quantized.items():
        bits.setdefault(path.rpartition(".")[2], set()).add((how.bits, how.group_size, how.mode))
    high, low = {(5, 64, "affine")}, {(4, 64, "affine")}
    assert bits == {
        **dict.fromkeys(("embed_tokens", "linear_x", "linear_y", "linear_out"), high),
        **dict.fromkeys(("q_proj", "k_proj", "v_proj"), high),
        **dict.fromkeys(("o_proj", "gate_proj", "up_proj", "down_proj"), low),
    }
    assert made.stored == "quantized (4 to 5 bits, groups of 64), the rest bfloat16"
    section = json.loads((tmp_path / "out" / CONFIG).read_text())["quantization"]
    assert section["bits"] == 4 and section["model.embed_tokens"]["bits"] == 5
    again = tmp_path / "named"
    convert(EMBEDDED, again, quantize=True, quant_predicate="rgemma")
    assert_same_tensors(all_tensors(again), all_tensors(tmp_path / "out"))


def test_gates_convolution_and_norms_stay_as_they_are(tmp_path):
    convert(EMBEDDED, tmp_path / "out", quantize=True)
    source, made = all_tensors(EMBEDDED), all_tensors(tmp_path / "out")
    kept = {name: value for name, value in made.items() if name in source}
    plain = [name for name in kept if made[name].dtype != mx.uint32]
    assert_same_tensors({n: made[n] for n in plain}, {n: source[n] for n in plain})
    parts = ("rg_lru.recurrent_param", "rg_lru.input_gate_weight", "rg_lru.recurrent_gate_weight")
    for part in (*parts, "conv_1d.weight", "pre_norm.weight", "final_norm.weight"):
        assert any(name.endswith(part) for name in plain), part


def test_projections_of_one_input_are_still_joined(tmp_path):
    """What shares an input has the same bits, so that a decode step has one product for it."""
    convert(EMBEDDED, tmp_path / "out", quantize=True)
    model, _ = load_model(tmp_path / "out")
    for layer in model.layers:
        for block in (layer.temporal_block, layer.mlp_block):
            assert "_fused" in block.__dict__, type(block).__name__


IMPOSSIBLE = {
    "unknown": ({"predicate": "q4_k_m"}, "quant-predicate is 'q4_k_m', expected one of rgemma, "),
    "other mode": ({"predicate": "rgemma", "mode": "mxfp4"}, "goes with q-mode affine, not with"),
    "bits": ({"predicate": "mixed_3_6", "bits": 4}, "mixed_3_6 sets the bits; leave out q-bits"),
    "group": ({"predicate": "mixed_3_6", "group_size": 48}, "q-group-size is 48"),
}


@pytest.mark.parametrize(("options", "message"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_impossible_recipes(options, message):
    with pytest.raises(UserError, match=message):
        Recipe.choose(**options)


def test_bits_or_another_mode_mean_no_recipe():
    assert Recipe.choose().name == "rgemma"
    assert Recipe.choose(group_size=32).of("model.embed_tokens", 6) == Quantization(32, 5)
    assert Recipe.choose(bits=4).of("model.embed_tokens", 6) == Quantization(64, 4)
    assert Recipe.choose("mxfp8").of("model.embed_tokens", 6) == Quantization(32, 8, "mxfp8")


def test_a_recipe_where_little_fits(tmp_path):
    made = convert(golden_copy("tiny-2b", tmp_path), tmp_path / "out", True, 32)
    assert "model.embed_tokens" in made.kept and len(made.kept) == 27
    load_model(tmp_path / "out")


EVERY_SETTING = {
    **{f"{b} bits": {"q_bits": b, "q_group_size": 32} for b in (2, 3, 4, 5, 6, 8)},
    "groups of 64": {"q_bits": 4, "q_group_size": 64},
    "groups of 128": {"q_bits": 4, "q_group_size": 128},
    **{mode: {"q_mode": mode} for mode in ("mxfp4", "nvfp4", "mxfp8")},
    **{recipe: {"quant_predicate": recipe} for recipe in RECIPES},
}

PLAIN_RUN = """
import sys, mlx.core as mx, numpy as np
from pathlib import Path
from mlx_lm import generate, load
for folder in sys.argv[1:]:
    model, tokenizer = load(folder)
    tokens = mx.array([tokenizer.encode("Once upon a time there was a")])
    np.save(folder + ".npy", np.array(model(tokens).astype(mx.float32)))
    assert len(generate(model, tokenizer, "Once upon a time", max_tokens=3)) > 0, folder
"""


@pytest.fixture(scope="module")
def every_setting(tmp_path_factory):
    """A small model that all group sizes fit, converted with every setting."""
    import numpy as np

    root = tmp_path_factory.mktemp("settings")
    values = json.loads((EMBEDDED / CONFIG).read_text())
    sizes = {"hidden_size": 128, "lru_width": 128, "intermediate_size": 256, "head_dim": 32}
    config = GriffinConfig.from_dict({**values, **sizes, "num_hidden_layers": 3})
    mx.random.seed(4)
    model = Model(config)
    noise = [(k, 0.1 * mx.random.normal(v.shape)) for k, v in tree_flatten(model.parameters())]
    model.load_weights(noise)
    save_model(root / "source", model, source=EMBEDDED, dtype=mx.float32)
    for name, options in EVERY_SETTING.items():
        made = convert(root / "source", root / name, quantize=True, **options)
        assert made.kept == (), name
    run_plain_python(PLAIN_RUN, *(root / name for name in EVERY_SETTING))
    return root, {name: np.load(root / f"{name}.npy") for name in EVERY_SETTING}


@pytest.mark.parametrize("name", EVERY_SETTING)
def test_every_setting_runs_here_and_in_plain_mlx_lm(every_setting, name):
    import numpy as np

    from mlx_rgemma import generate

    root, theirs = every_setting
    model, tokenizer = load(root / name, window="hf")
    tokens = mx.array([tokenizer.encode("Once upon a time there was a")])
    ours = np.array(model(tokens))
    # mlx-lm rounds the embedding's scale differently, and its norms have another epsilon.
    assert np.abs(ours - theirs[name]).max() < 0.02 * np.abs(ours).max()
    assert len(generate(model, tokenizer, "Once upon a time", max_tokens=3)) > 0
