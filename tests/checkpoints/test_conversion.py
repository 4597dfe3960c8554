"""Conversion: bit-exact where nothing is changed, mlx-lm's own result where something is."""

from __future__ import annotations

import json
import os
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.assertions import LOGITS_ATOL, max_error
from helpers.checkpoint_files import (
    CONFIG,
    GEMMA_LIKE,
    INDEX,
    SINGLE,
    STORIES,
    all_tensors,
    assert_same_tensors,
    edit_json,
    edit_tensors,
    golden_copy,
    train_sentencepiece,
)
from helpers.models import GOLDEN, golden, golden_weights
from mlx.utils import tree_flatten

from mlx_rgemma import convert, load, load_model
from mlx_rgemma.checkpoints import save as writing
from mlx_rgemma.checkpoints.formats.huggingface import CheckpointFolder
from mlx_rgemma.checkpoints.save import save_model
from mlx_rgemma.checkpoints.schema import check_contents
from mlx_rgemma.checkpoints.tensors import count_nonfinite
from mlx_rgemma.errors import CheckpointError, UserError
from mlx_rgemma.io.hub import EMBEDDED
from mlx_rgemma.tokenizers.load import load_tokenizer


def in_mlx_layout(weights):
    """Hugging Face's tensors as MLX has them, without the redundant head."""
    return {
        name: mx.contiguous(value.moveaxis(2, 1)) if name.endswith("conv_1d.weight") else value
        for name, value in weights.items()
        if name != "lm_head.weight"
    }


def test_plain_conversion_keeps_every_bit(model_name, tmp_path):
    made = convert(GOLDEN / model_name, tmp_path / "out")
    expected = in_mlx_layout(golden_weights(model_name))
    assert_same_tensors(all_tensors(tmp_path / "out"), expected)
    assert made.nbytes == sum(value.nbytes for value in expected.values())
    assert made.bits_per_weight == {"tiny-9b": 32}.get(model_name, 16)
    assert made.kept == ()
    _, config = load_model(tmp_path / "out")
    assert config.dtype == ("float32" if model_name == "tiny-9b" else "bfloat16")


def test_logits_of_the_converted(model_name, tmp_path):
    convert(GOLDEN / model_name, tmp_path / "out")
    model, _ = load_model(tmp_path / "out", dtype="float32")
    data = golden(f"decode/{model_name}.npz")
    assert max_error(model(mx.array(data["tokens"])), data["google_full"]) < LOGITS_ATOL


def test_converting_again_changes_nothing(model_name, tmp_path):
    convert(GOLDEN / model_name, tmp_path / "one")
    convert(tmp_path / "one", tmp_path / "two")
    for name in (CONFIG, INDEX, "generation_config.json"):
        assert (tmp_path / "one" / name).read_text() == (tmp_path / "two" / name).read_text()
    assert_same_tensors(all_tensors(tmp_path / "two"), all_tensors(tmp_path / "one"))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype_is_that_of_every_tensor(tmp_path, dtype):
    convert(GOLDEN / "tiny-2b", tmp_path / "out", dtype=dtype)
    expected = {
        name: value.astype(getattr(mx, dtype))
        for name, value in in_mlx_layout(golden_weights("tiny-2b")).items()
    }
    assert_same_tensors(all_tensors(tmp_path / "out"), expected)
    values = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert values["dtype"] == values["torch_dtype"] == dtype


SETTINGS = {
    **{f"{b} bits": ({"q_bits": b}, (64, b, "affine")) for b in (2, 3, 4, 5, 6, 8)},
    "groups of 32": ({"q_bits": 4, "q_group_size": 32}, (32, 4, "affine")),
    "mxfp4": ({"q_mode": "mxfp4"}, (32, 4, "mxfp4")),
    "nvfp4": ({"q_mode": "nvfp4"}, (16, 4, "nvfp4")),
    "mxfp8": ({"q_mode": "mxfp8"}, (32, 8, "mxfp8")),
    "float16 scales": ({"q_bits": 4, "dtype": "float16"}, (64, 4, "affine")),
}


@pytest.mark.parametrize(("options", "expected"), SETTINGS.values(), ids=SETTINGS)
def test_quantized_as_mlx_does(tmp_path, options, expected):
    group_size, bits, mode = expected
    made = convert(EMBEDDED, tmp_path / "out", quantize=True, **options)
    model, config = load_model(EMBEDDED, dtype=options.get("dtype", "bfloat16"))
    nn.quantize(model, group_size, bits, mode=mode, class_predicate=model.quant_predicate)
    assert_same_tensors(all_tensors(tmp_path / "out"), dict(tree_flatten(model.parameters())))
    assert made.kept == ()
    quantization = json.loads((tmp_path / "out" / CONFIG).read_text())["quantization"]
    assert quantization == {"group_size": group_size, "bits": bits, "mode": mode}
    reloaded, _ = load_model(tmp_path / "out")
    assert mx.isfinite(reloaded(mx.array([[2, 5, 9]]))).all().item()
    assert config.quantization is None


def test_what_does_not_fit_is_kept_and_reported(tmp_path):
    """tiny-2b is 80 wide: only the matrices that read the MLP's 96 channels fit groups of 32."""
    made = convert(GOLDEN / "tiny-2b", tmp_path / "out", quantize=True, q_group_size=32)
    assert "model.embed_tokens" in made.kept and len(made.kept) == 27
    contents = check_contents(CheckpointFolder.open(tmp_path / "out"))
    assert set(contents.quantized) == {f"model.layers.{i}.mlp_block.down_proj" for i in range(5)}
    load_model(tmp_path / "out")


def test_groups_of_16_need_rows_of_32(tmp_path):
    """MLX cannot quantize rows of 80 to nvfp4, though they are five groups."""
    made = convert(GOLDEN / "tiny-2b", tmp_path / "out", quantize=True, q_mode="nvfp4")
    assert len(made.kept) == 27
    with pytest.raises(ValueError, match="Cannot reshape"):
        mx.quantize(mx.zeros((97, 80)), mode="nvfp4")


def test_dequantize(tmp_path):
    convert(EMBEDDED, tmp_path / "q", quantize=True, q_bits=6)
    convert(tmp_path / "q", tmp_path / "plain", dequantize=True, dtype="float32")
    quantized, _ = load_model(tmp_path / "q", dtype="float32")
    plain, config = load_model(tmp_path / "plain")
    assert config.quantization is None
    assert "quantization_config" not in json.loads((tmp_path / "plain" / CONFIG).read_text())
    assert isinstance(plain.model.embed_tokens, nn.Embedding)
    tokens = mx.array([[2, 5, 9, 100, 7]])
    np.testing.assert_allclose(np.array(plain(tokens)), np.array(quantized(tokens)), atol=1e-4)


def test_quantized_source(tmp_path):
    convert(EMBEDDED, tmp_path / "q8", quantize=True, q_bits=8)
    convert(tmp_path / "q8", tmp_path / "same")
    assert_same_tensors(all_tensors(tmp_path / "same"), all_tensors(tmp_path / "q8"))
    convert(tmp_path / "q8", tmp_path / "q8 in float32", dtype="float32")
    scales = all_tensors(tmp_path / "q8 in float32")["model.embed_tokens.scales"]
    assert scales.dtype == mx.float32
    again = convert(tmp_path / "q8", tmp_path / "q4", quantize=True, q_bits=4)
    assert any("already quantized" in note for note in again.notes)
    quantized = check_contents(CheckpointFolder.open(tmp_path / "q4")).quantized
    assert {how.bits for how in quantized.values()} == {4}


IMPOSSIBLE = {
    "bits": ({"quantize": True, "q_bits": 7}, "q-bits is 7; .* one of 2, 3, 4, 5, 6, 8"),
    "bits of mode": ({"quantize": True, "q_mode": "mxfp4", "q_bits": 8}, "it must be 4"),
    "group": ({"quantize": True, "q_group_size": 48}, "one of 32, 64, 128"),
    "group of mode": (
        {"quantize": True, "q_mode": "nvfp4", "q_group_size": 32},
        "q-group-size is 32; with q-mode nvfp4 it must be 16",
    ),
    "no bits": ({"quantize": True, "q_bits": 0}, "q-bits is 0"),
    "negative": ({"quantize": True, "q_group_size": -64}, "q-group-size is -64"),
    "mode": ({"quantize": True, "q_mode": "int4"}, "q-mode is 'int4', expected one of affine, m"),
    "bits alone": ({"q_bits": 8}, "need -q"),
    "mode alone": ({"q_mode": "mxfp4"}, "need -q"),
    "both ways": ({"quantize": True, "dequantize": True}, "exclude each other"),
    "dtype": ({"dtype": "int8"}, "dtype is 'int8', expected one of float32"),
}


@pytest.mark.parametrize(("options", "message"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_impossible_options_are_refused_before_any_work(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "a source that is not looked at", tmp_path / "out", **options)


def test_nothing_to_do(tmp_path):
    with pytest.raises(UserError, match="not quantized; leave out --dequantize"):
        convert(EMBEDDED, tmp_path / "out", dequantize=True)
    with pytest.raises(UserError, match=r"q-group-size is 128, which divides no width .* \(80, 96"):
        convert(GOLDEN / "tiny-2b", tmp_path / "out", quantize=True, q_group_size=128)
    assert list(tmp_path.iterdir()) == []


def test_existing_target_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        convert(tmp_path / "a source that is not looked at", tmp_path / "out")


@pytest.mark.parametrize("options", [{}, {"dtype": "float32"}], ids=str)
def test_what_is_not_finite_is_reported(tmp_path, options):
    folder = golden_copy("tiny-2b", tmp_path)
    norm = mx.array([mx.inf, mx.nan, -mx.inf, *[0.0] * 77]).astype(mx.bfloat16)
    embedding = mx.full((97, 80), mx.nan).astype(mx.bfloat16)
    edit_tensors(
        folder / SINGLE, model__final_norm__weight=norm, model__embed_tokens__weight=embedding
    )
    made = convert(folder, tmp_path / "out", **options)
    assert made.notes[0] == (
        "NaN or infinite values in: model.embed_tokens.weight (7760 NaN, 0 infinite),"
        " model.final_norm.weight (1 NaN, 2 infinite)."
    )


def test_what_is_not_finite_is_refused_if_asked_to(tmp_path):
    folder = golden_copy("tiny-2b", tmp_path)
    broken = mx.array([mx.inf, *[0.0] * 79]).astype(mx.bfloat16)
    edit_tensors(folder / SINGLE, model__final_norm__weight=broken)
    with pytest.raises(CheckpointError, match=r"final_norm\.weight \(0 NaN, 1 infinite\); without"):
        convert(folder, tmp_path / "out", strict=True)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-2b"]
    convert(GOLDEN / "tiny-2b", tmp_path / "out", strict=True)


def test_what_a_new_dtype_makes_infinite_is_reported(tmp_path):
    folder = golden_copy("tiny-2b", tmp_path)
    large = mx.array([1e9, *[0.0] * 79]).astype(mx.bfloat16)
    edit_tensors(folder / SINGLE, model__final_norm__weight=large)
    assert "infinite" not in convert(folder, tmp_path / "same").notes[0]
    made = convert(folder, tmp_path / "out", dtype="float16")
    assert made.notes[0].endswith("model.final_norm.weight (0 NaN, 1 infinite).")


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
def test_count_nonfinite(dtype):
    largest = 65504.0 if dtype == mx.float16 else 3e38
    value = mx.array([[0.0, -largest, 1e-30], [largest, 1.0, -0.0]]).astype(dtype)
    assert count_nonfinite(value) == count_nonfinite(value.T) == (0, 0)
    value[1, 2] = -mx.inf
    assert count_nonfinite(value) == (0, 1)
    value[0, 0] = mx.nan
    assert count_nonfinite(value.T) == (1, 1)


def test_notes(tmp_path):
    made = convert(GOLDEN / "tiny-9b", tmp_path / "out")
    head, tokenizer, mlx_lm = made.notes
    assert "lm_head.weight" in head and "no tokenizer" in tokenizer
    assert "plain mlx-lm cannot: it takes lru_width to be hidden_size" in mlx_lm
    assert "cannot run this model" in (tmp_path / "out" / "README.md").read_text()
    assert convert(EMBEDDED, tmp_path / "embedded").notes == ()


def test_config_keeps_what_the_source_says(tmp_path):
    folder = golden_copy("tiny-2b", tmp_path)
    edit_json(folder / CONFIG, own_key={"a": [1]}, _name_or_path="/somewhere")
    convert(folder, tmp_path / "out")
    values = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert values["own_key"] == {"a": [1]} and values["w_init_variance_scale"] == 0.01
    assert values["block_types"] == ["recurrent", "recurrent", "attention"]
    assert {"_block_types", "_name_or_path", "quantization", "window"}.isdisjoint(values)
    assert values["rope_theta"] == values["rope_parameters"]["rope_theta"] == 10000.0


def test_config_is_read_by_transformers(model_name, tmp_path):
    from transformers import AutoConfig

    convert(GOLDEN / model_name, tmp_path / "out")
    before = AutoConfig.from_pretrained(GOLDEN / model_name).to_dict()
    after = AutoConfig.from_pretrained(tmp_path / "out").to_dict()
    for key in ("hidden_size", "lru_width", "head_dim", "intermediate_size", "vocab_size"):
        assert after[key] == before[key], key
    for key in ("attention_window_size", "logits_soft_cap", "rope_parameters", "eos_token_id"):
        assert after[key] == before[key], key
    assert tuple(after["block_types"]) == ("recurrent", "recurrent", "attention")


def test_files(tmp_path):
    convert(EMBEDDED, tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        *(CONFIG, SINGLE, INDEX, "generation_config.json", "README.md"),
        *("tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
    }
    for name in ("tokenizer.json", "tokenizer.model"):
        assert (tmp_path / "out" / name).read_bytes() == (EMBEDDED / name).read_bytes()
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"] == {"total_size": 6207360, "total_parameters": 3103680}


def test_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "SHARD_BYTES", 50_000)
    convert(GOLDEN / "tiny-2b", tmp_path / "out")
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert files == [
        f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)
    ]
    assert len(files) > 8
    assert max((tmp_path / "out" / name).stat().st_size for name in files) < 60_000
    assert_same_tensors(all_tensors(tmp_path / "out"), in_mlx_layout(golden_weights("tiny-2b")))
    model, _ = load_model(tmp_path / "out")
    assert model(mx.array([[1]])).shape == (1, 1, 97)


def chat_model(tmp_path: Path, name: str = "recurrentgemma-2b-it") -> Path:
    """A checkpoint with a bare tokenizer.model that knows turns."""
    folder = golden_copy("tiny-2b", tmp_path)
    train_sentencepiece(folder / "tokenizer.model", **GEMMA_LIKE)
    vocabulary = len(load_tokenizer(folder))
    edit_json(folder / CONFIG, vocab_size=vocabulary)
    embedding = mx.random.normal((vocabulary, 80)).astype(mx.bfloat16)
    edit_tensors(folder / SINGLE, model__embed_tokens__weight=embedding)
    return folder.rename(tmp_path / name)


def test_bare_tokenizer_of_a_chat_model(tmp_path):
    source = chat_model(tmp_path)
    (source / "README.md").write_text("---\nlanguage: en\ntags:\n- stories\n---\n# Mine\n")
    convert(source, tmp_path / "out")
    _, tokenizer = load(tmp_path / "out")
    end_of_turn = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert tokenizer.has_chat_template and tokenizer.eos_token_ids == {1, end_of_turn}
    for file in (CONFIG, "generation_config.json"):
        values = json.loads((tmp_path / "out" / file).read_text())
        assert values["eos_token_id"] == [1, end_of_turn], file
    text = "".join(STORIES)
    assert tokenizer.encode(text) == load_tokenizer(source).encode(text)
    card = (tmp_path / "out" / "README.md").read_text()
    for line in ("language: en", "- stories", "- mlx", "library_name: mlx", "license: gemma"):
        assert line in card.split("---")[1]
    assert "base_model: google/recurrentgemma-2b-it" in card


def test_broken_tokenizer_stops_the_conversion(tmp_path):
    source = chat_model(tmp_path)
    (source / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="not a SentencePiece model"):
        convert(source, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {source.name}


@pytest.mark.parametrize("quantized", [False, True], ids=["plain", "quantized"])
def test_save_model(tmp_path, quantized, monkeypatch):
    monkeypatch.setenv("MLX_RGEMMA_DEQUANTIZE", "off")  # float32 copies round less than bfloat16
    model, _ = load_model(EMBEDDED, dtype="bfloat16")
    if quantized:
        nn.quantize(
            model,
            class_predicate=lambda path, module: (
                hasattr(module, "to_quantized")
                and {"group_size": 32, "bits": 8 if "embed" in path else 4}
            ),
        )
    save_model(tmp_path / "out", model, source=EMBEDDED)
    assert_same_tensors(all_tensors(tmp_path / "out"), dict(tree_flatten(model.parameters())))
    reloaded, tokenizer = load(tmp_path / "out", dtype="bfloat16")
    tokens = mx.array([tokenizer.encode("The cat")])
    assert mx.array_equal(reloaded(tokens), model(tokens)).item()
    if quantized:
        section = json.loads((tmp_path / "out" / CONFIG).read_text())["quantization"]
        assert section["bits"] == 4 and section["model.embed_tokens"]["bits"] == 8


def test_save_model_alone(tmp_path):
    model, _ = load_model(GOLDEN / "tiny-9b", dtype="float32")
    save_model(tmp_path / "out", model, dtype=mx.bfloat16)
    assert {value.dtype for value in all_tensors(tmp_path / "out").values()} == {mx.bfloat16}
    assert load_model(tmp_path / "out")[1].lru_width == 72


LAUGHS = "\n".join(["a0: &a0 [x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60))])
CARDS = {
    "laughs": f"---\n{LAUGHS}\nbase_model: *a59\n---\n",
    "recursion": "---\ntags: &x [*x]\n---\n",
    "deep": "---\ntags: " + "[" * 5000 + "]" * 5000 + "\n---\n",
    "tags of lists": "---\ntags: [[a], {b: c}, 1]\n---\n",
    "digits": "---\nlicense: " + "9" * 5000 + "\n---\n",
    "large": "---\nlicense: mit\n---\n" + "x" * 2_000_000,
}


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_hostile_model_cards_are_left_out(tmp_path, card):
    source = golden_copy("tiny-2b", tmp_path)
    (source / "README.md").write_text(card)
    convert(source, tmp_path / "out")
    assert (tmp_path / "out" / "README.md").stat().st_size < 3000


def test_a_pipe_as_model_card_is_not_waited_for(tmp_path):
    source = golden_copy("tiny-2b", tmp_path)
    os.mkfifo(source / "README.md")
    convert(source, tmp_path / "out")
