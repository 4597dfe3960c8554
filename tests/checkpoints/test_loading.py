"""Loading: the right numbers from every layout, the right dtype on every device."""

from __future__ import annotations

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from helpers.assertions import LOGITS_ATOL, max_error
from helpers.checkpoint_files import CONFIG, SINGLE, edit_json, edit_tensors, golden_copy
from helpers.models import GOLDEN, golden
from mlx.utils import tree_flatten

from benchmarks.embedded_quality import measure
from mlx_rgemma import GriffinConfig, Model, load, load_model
from mlx_rgemma.checkpoints.convert import convert
from mlx_rgemma.checkpoints.save import save_model
from mlx_rgemma.errors import CheckpointError, ConfigError, UserError
from mlx_rgemma.io.hub import EMBEDDED

CPU = mx.default_device() == mx.Device(mx.cpu)


def longest(name: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    data = golden(f"logits/{name}.npz")
    length = max(int(k.removeprefix("tokens_L")) for k in data if k.startswith("tokens"))
    return data[f"tokens_L{length}"], {w: data[f"{w}_L{length}"] for w in ("google", "hf")}


@pytest.mark.parametrize("window", ["google", "hf"])
def test_golden(model_name, window):
    model, config = load_model(GOLDEN / model_name, dtype="float32", window=window)
    tokens, logits = longest(model_name)
    assert config.window == window
    assert max_error(model(mx.array(tokens)), logits[window]) < LOGITS_ATOL


def test_loading_takes_the_memory_of_the_weights(tmp_path):
    """Parts of joined projections are let go of before the next layer's are read."""
    values = {
        "model_type": "recurrent_gemma",
        "vocab_size": 512,
        "hidden_size": 256,
        "lru_width": 256,
        "intermediate_size": 1536,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "attention_window_size": 64,
        "block_types": ["recurrent", "recurrent", "attention"],
    }
    made = Model(GriffinConfig.from_dict(values))
    mx.eval(made.parameters())
    save_model(tmp_path / "model", made, dtype=mx.float32)
    parameters: list = tree_flatten(made.parameters())
    own = sum(value.nbytes for _, value in parameters)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model, _ = load_model(tmp_path / "model", dtype="float32")
    assert model.layers[0].mlp_block.__dict__["_fused"] is not None
    assert mx.get_peak_memory() - before < 1.05 * own


def test_window_of_the_file_is_kept(tmp_path):
    folder = golden_copy("tiny-2b", tmp_path)
    edit_json(folder / CONFIG, window="hf")
    assert load_model(folder)[1].window == "hf"
    with pytest.raises(ConfigError, match="window is 'wide'"):
        load_model(folder, window="wide")


def test_both_convolution_layouts_give_the_same(tmp_path):
    folder = golden_copy("tiny-2b", tmp_path)
    tokens, logits = longest("tiny-2b")
    convs = [f"model__layers__{i}__temporal_block__conv_1d__weight" for i in (0, 1, 3, 4)]
    edit_tensors(folder / SINGLE, **{c: lambda w: mx.contiguous(w.moveaxis(2, 1)) for c in convs})
    model, _ = load_model(folder, dtype="float32")
    assert max_error(model(mx.array(tokens)), logits["google"]) < LOGITS_ATOL


def dtypes(model) -> set[str]:
    return {str(v.dtype).removeprefix("mlx.core.") for _, v in tree_flatten(model.parameters())}


def test_default_dtype():
    model, config = load_model(GOLDEN / "tiny-2b")
    assert config.dtype == "bfloat16"
    assert dtypes(model) == ({"float32"} if CPU else {"bfloat16"})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", mx.bfloat16], ids=str)
def test_chosen_dtype(dtype):
    model, _ = load_model(GOLDEN / "tiny-2b", dtype=dtype)
    assert dtypes(model) == {str(dtype).removeprefix("mlx.core.")}


@pytest.mark.parametrize("dtype", ["int8", "float64", mx.int32, "f32"], ids=str)
def test_impossible_dtype(dtype):
    with pytest.raises(UserError, match="expected one of float32, bfloat16, float16"):
        load_model(GOLDEN / "tiny-2b", dtype=dtype)


def test_quantized_activations_are_float32(tmp_path):
    convert(GOLDEN / "tiny-sharded", tmp_path / "q", quantize=True)
    model, config = load_model(tmp_path / "q", dtype="float32")
    assert config.quantization["bits"] == 4
    assert dtypes(model) == {"float32", "uint32"}
    assert model(mx.array([[1, 2, 3]])).dtype == mx.float32


@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4", "mxfp8"])
def test_other_quantizations_run(tmp_path, mode):
    convert(GOLDEN / "tiny-sharded", tmp_path / "q", quantize=True, q_mode=mode)
    model, _ = load_model(tmp_path / "q")
    tokens, logits = longest("tiny-sharded")
    found = np.array(model(mx.array(tokens))).ravel()
    assert np.corrcoef(found, logits["google"].ravel())[0, 1] > 0.7


def test_lazy_reads_nothing_but_headers(tmp_path):
    """With lazy, a broken byte of a weight is not seen until it is used."""
    folder = golden_copy("tiny-2b", tmp_path)
    model, _ = load_model(folder, lazy=True, dtype="float32")
    size = (folder / SINGLE).stat().st_size
    with (folder / SINGLE).open("r+b") as file:
        file.seek(size - 4)
        file.write(b"\x80\x7f\x80\x7f")  # infinities, in the last tensor
    assert not mx.isfinite(model(mx.array([[1, 2, 3]]))).all().item()


def test_missing_tokenizer():
    with pytest.raises(CheckpointError, match=r"no tokenizer: .* use load_model"):
        load(GOLDEN / "tiny-2b")


def test_embedded_model():
    model, tokenizer = load()
    assert tokenizer.bos_token_id == 2 and tokenizer.eos_token_ids == {1}
    tokens = tokenizer.encode("Once upon a time")
    assert tokens[0] == 2
    for _ in range(20):
        tokens.append(int(model(mx.array([tokens]))[0, -1].argmax()))
    assert "there was a little girl named" in tokenizer.decode(tokens)


def test_embedded_model_is_small():
    sizes = {file.name: file.stat().st_size for file in EMBEDDED.iterdir()}
    assert sum(sizes.values()) < 8_000_000
    assert {"README.md", CONFIG, SINGLE, "tokenizer.json", "tokenizer.model"} <= sizes.keys()


def test_embedded_model_is_as_good_as_its_card_says():
    card = (EMBEDDED / "README.md").read_text()
    line = next(line for line in card.splitlines() if line.startswith("| **bf16**"))
    stated = float(line.split("|")[2])
    assert measure(*load(dtype="float32")).bits_per_byte == pytest.approx(stated, abs=2e-4)


@pytest.fixture
def adapters(tmp_path):
    """Adapters as mlx-lm's trainer writes them, for the last layer of the embedded model."""
    from mlx_lm.tuner.utils import linear_to_lora_layers

    parameters = {"rank": 2, "scale": 10.0, "dropout": 0.0, "keys": ["mlp_block.up_proj"]}
    model, _ = load_model(None)
    model.freeze()
    linear_to_lora_layers(model, 1, parameters)
    trained = {
        name: mx.random.normal(value.shape, key=mx.random.key(3)) * 0.1
        for name, value in tree_flatten(model.trainable_parameters())
    }
    folder = tmp_path / "adapters"
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), trained)
    settings = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def test_adapters(adapters):
    plain, _ = load()
    adapted, _ = load(adapter_path=adapters)
    tokens = mx.array([[2, 10, 20, 30]])
    assert {n for n, _ in tree_flatten(adapted.parameters()) if "lora" in n} == {
        f"model.layers.5.mlp_block.up_proj.lora_{x}" for x in "ab"
    }
    assert mx.abs(adapted(tokens) - plain(tokens)).max().item() > 1e-3
    assert not adapted.training


def test_broken_adapters(adapters, tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        load(adapter_path=tmp_path / "absent")
    weights = adapters / "adapters.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=r"adapters.safetensors: truncated"):
        load(adapter_path=adapters)
    weights.write_bytes(content)
    edit_tensors(weights, other__lora_a=mx.zeros((3, 3)))
    with pytest.raises(CheckpointError, match="trained on another model") as error:
        load(adapter_path=adapters)
    assert "\n" not in str(error.value)
    weights.unlink()
    with pytest.raises(CheckpointError, match="the adapters are incomplete"):
        load(adapter_path=adapters)


def test_source_is_not_written_to(tmp_path):
    """A bare tokenizer.model is translated elsewhere."""
    folder = tmp_path / "bare"
    shutil.copytree(EMBEDDED, folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    folder.chmod(0o500)
    _, tokenizer = load(folder)
    folder.chmod(0o700)
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    assert tokenizer.encode("a")[0] == 2


def test_checksums_are_compared_if_asked_for(tmp_path):
    convert(EMBEDDED, tmp_path / "out")
    load(tmp_path / "out", verify=True)
    path = tmp_path / "out" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    load(tmp_path / "out")
    with pytest.raises(CheckpointError, match="is damaged: its checksum is"):
        load(tmp_path / "out", verify=True)
    with pytest.raises(CheckpointError, match="is damaged: its checksum is"):
        convert(tmp_path / "out", tmp_path / "again")
    assert not (tmp_path / "again").exists()
