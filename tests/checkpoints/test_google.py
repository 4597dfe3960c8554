"""Google's formats: the same bits as Hugging Face's, Google's own logits, and what is missing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from helpers.assertions import LOGITS_ATOL, max_error
from helpers.checkpoint_files import CONFIG, GEMMA_LIKE, all_tensors, assert_same_tensors
from helpers.checkpoint_files import train_sentencepiece as train
from helpers.google_files import (
    FLAX,
    SAID,
    TORCH,
    flax_copy,
    needs_tensorstore,
    tar_of,
    torch_entry,
    torch_pickle,
    torch_zip,
)
from helpers.models import GOLDEN, golden, golden_weights

from benchmarks.convert_large import FORMATS as WRITERS
from benchmarks.convert_large import Noise
from mlx_rgemma import GriffinConfig, convert, load, load_model
from mlx_rgemma.checkpoints.formats import google
from mlx_rgemma.checkpoints.formats.google import ConfigOverrides, open_google, place
from mlx_rgemma.checkpoints.schema import expected_tensors
from mlx_rgemma.convert import main
from mlx_rgemma.errors import CheckpointError, UserError
from mlx_rgemma.io.safetensors import TensorInfo

FORMATS = {"pytorch": TORCH, "pytorch folder": TORCH.parent, **FLAX}
SOURCES = [
    pytest.param(path, id=name, marks=needs_tensorstore if name in FLAX else ())
    for name, path in FORMATS.items()
]


@pytest.fixture(scope="module")
def expected():
    """What Hugging Face's golden checkpoint converts to, made without this package's reader."""
    return {
        name: mx.contiguous(value.moveaxis(2, 1)) if name.endswith("conv_1d.weight") else value
        for name, value in golden_weights("tiny-2b").items()
    }


@pytest.mark.parametrize("source", SOURCES)
def test_the_same_bits_and_googles_logits(tmp_path, source, expected):
    made = convert(source, tmp_path / "out", **SAID)
    assert_same_tensors(all_tensors(tmp_path / "out"), expected)
    assert "Attention window 16, soft cap 30, embeddings scaled: from the options." in made.notes
    model, config = load_model(tmp_path / "out", dtype="float32")
    original = GriffinConfig.from_dict(json.loads((GOLDEN / "tiny-2b" / CONFIG).read_text()))
    assert config == replace(original, block_types=config.block_types)
    assert config.layer_types == original.layer_types
    data = golden("logits/tiny-2b.npz")
    lengths = [key.removeprefix("tokens_L") for key in data if key.startswith("tokens_L")]
    assert len(lengths) == 5
    for length in lengths:
        logits = model(mx.array(data[f"tokens_L{length}"]))
        assert max_error(logits, data[f"google_L{length}"]) < LOGITS_ATOL


@pytest.mark.parametrize("source", SOURCES)
def test_quantized_on_the_way(tmp_path, source):
    options = {"quantize": True, "q_group_size": 32, "q_bits": 4}
    convert(source, tmp_path / "one", **SAID, **options)
    convert(GOLDEN / "tiny-2b", tmp_path / "two", **options)
    assert_same_tensors(all_tensors(tmp_path / "one"), all_tensors(tmp_path / "two"))


def test_float32_and_float16_files(tmp_path):
    """Google's archives are bfloat16; fine-tuned ones may be anything."""
    from mlx_rgemma.checkpoints.formats.pytorch import TorchFile

    store = TorchFile(TORCH)
    for dtype, title in ((mx.float32, "F32"), (mx.float16, "F16")):
        entries, storages, values = {}, [], {}
        for key, (name, info) in enumerate(store.tensors.items()):
            bits = mx.array(store.read(name)).view(mx.bfloat16).astype(dtype)
            values[name] = np.array(bits)
            entries[name] = torch_entry(info.shape, title, str(key))
            storages.append((str(key), values[name].tobytes()))
        torch_zip(tmp_path / f"{title}.pt", torch_pickle(entries), storages)
        convert(tmp_path / f"{title}.pt", tmp_path / title, **SAID)
        found = all_tensors(tmp_path / title)
        assert {value.dtype for value in found.values()} == {dtype}
        assert np.array_equal(
            np.array(found["model.layers.0.mlp_block.up_proj.weight"]),
            values["blocks.0.mlp_block.ffw_up.w"][1].T,
        )


class Shapes:
    """Google's tensors of a model, without their bytes."""

    def __init__(self, config: GriffinConfig, path, transposed_kernels: bool = False) -> None:
        self.path = path
        self.transposed_kernels = transposed_kernels
        places = [place(wanted, transposed_kernels) for wanted in expected_tensors(config)]
        self.tensors = {p.name: TensorInfo(p.name, "BF16", p.shape, path) for p in places}

    def read(self, name, part=None):
        raise AssertionError(f"{name} is not needed for this")


@pytest.mark.parametrize("flax", [False, True], ids=["pytorch", "flax"])
@pytest.mark.parametrize("name", ["2b", "9b"])
def test_released_shapes_are_recognised(tmp_path, name, flax):
    preset = GriffinConfig.preset(name)
    folder, released, said = open_google(Shapes(preset, tmp_path, flax), ConfigOverrides())
    assert folder.config == preset and released == name
    title = name.upper()
    assert said == (
        "Attention window 2048, soft cap 30, embeddings scaled: the shape is that of the released"
        f" {title}."
    )
    folder, _, said = open_google(Shapes(preset, tmp_path, flax), ConfigOverrides(4096, 0.0))
    assert folder.config == replace(preset, attention_window_size=4096, logits_soft_cap=0.0)
    assert said.endswith(f"{title}, but for --attention-window-size, --logits-soft-cap.")


UNUSUAL = {
    "no attention": {"block_types": ("recurrent",)},
    "no recurrence": {"block_types": ("attention",)},
    "no cycle": {"block_types": ("recurrent", "attention", "attention", "recurrent", "recurrent")},
    "wide recurrence": {"lru_width": 96, "num_attention_heads": 4, "hidden_size": 64},
    "wide heads": {"head_dim": 32},
    "taps": {"conv1d_width": 3},
}


@pytest.mark.parametrize("flax", [False, True], ids=["pytorch", "flax"])
@pytest.mark.parametrize("changes", UNUSUAL.values(), ids=UNUSUAL)
def test_other_shapes(tmp_path, changes, flax):
    sizes = {"vocab_size": 97, "hidden_size": 80, "intermediate_size": 192, "lru_width": 80}
    sizes |= {"num_hidden_layers": 5, "num_attention_heads": 5, "head_dim": 16}
    config = GriffinConfig(**{**sizes, "attention_window_size": 7, **changes}, dtype="bfloat16")
    found = open_google(Shapes(config, tmp_path, flax), ConfigOverrides(7, 30.0, True))[0].config
    assert found.layer_types == config.layer_types
    assert replace(found, block_types=config.block_types) == config


def test_unknown_shape_needs_options(tmp_path):
    with pytest.raises(CheckpointError) as error:
        convert(TORCH, tmp_path / "out")
    for option in ("--attention-window-size", "--logits-soft-cap", "--embeddings-scale"):
        assert option in str(error.value)
    with pytest.raises(CheckpointError) as error:
        convert(TORCH, tmp_path / "out", attention_window_size=16, embeddings_scale=True)
    assert str(error.value).endswith("scale: give --logits-soft-cap.")
    assert list(tmp_path.iterdir()) == []


def test_options_are_for_what_is_not_said(tmp_path):
    with pytest.raises(UserError, match="--attention-window-size: only for Google's formats"):
        convert(GOLDEN / "tiny-2b", tmp_path / "out", attention_window_size=16)


def test_no_cap_and_no_scale(tmp_path):
    options = {"attention_window_size": 16, "logits_soft_cap": 0.0, "embeddings_scale": False}
    made = convert(TORCH, tmp_path / "out", **options)
    assert any("no soft cap, embeddings not scaled" in note for note in made.notes)
    config = load_model(tmp_path / "out")[1]
    assert config.logits_soft_cap == 0 and not config.embeddings_scale_by_sqrt_dim


BROKEN = {
    "missing": (lambda t: t.pop("final_norm.scale"), "1 tensor missing: final_norm.scale"),
    "missing block": (
        lambda t: [t.pop(name) for name in list(t) if name.startswith("blocks.1.")],
        "blocks missing below 4",
    ),
    "missing last tensor": (
        lambda t: t.pop("blocks.4.mlp_block.ffw_down.bias"),
        "missing: blocks.4.mlp_block.ffw_down.bias",
    ),
    "no embedding": (lambda t: t.pop("embedder.input_embedding"), "input_embedding missing"),
    "surplus": (
        lambda t: t.update({"opt.step": TensorInfo("opt.step", "F32", (1,))}),
        "surplus: opt.step",
    ),
    "misshapen": (
        lambda t: t.update({"final_norm.scale": TensorInfo("", "BF16", (79,))}),
        r"final_norm.scale \(\[79\], expected \[80\]\)",
    ),
    "dtype": (
        lambda t: t.update({"final_norm.scale": TensorInfo("", "I64", (80,))}),
        r"wrong dtype: final_norm.scale \(I64",
    ),
    "two kinds": (
        lambda t: t.update({"blocks.0.attention_block.x": TensorInfo("", "F32", (1,))}),
        "block 0 is both",
    ),
    "no kind": (
        lambda t: [t.pop(name) for name in list(t) if "blocks.0.recurrent_block" in name],
        "block 0 is neither",
    ),
    "nothing": (lambda t: t.clear(), "no blocks"),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_incomplete_trees(tmp_path, change, message):
    config = GriffinConfig.from_dict(json.loads((GOLDEN / "tiny-2b" / CONFIG).read_text()))
    store = Shapes(config, tmp_path)
    change(store.tensors)
    with pytest.raises(CheckpointError, match=message):
        open_google(store, ConfigOverrides(16, 30.0, True))


@pytest.mark.parametrize("kind", ["pytorch", pytest.param("flax", marks=needs_tensorstore)])
def test_memory_holds_one_tensor(tmp_path, kind):
    """Eight layers more do not need more memory, neither MLX's nor NumPy's."""
    sizes = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 2048, "lru_width": 256}
    sizes |= {"num_attention_heads": 4, "head_dim": 64, "attention_window_size": 16}
    noise, peaks, totals = Noise(), [], []
    for layers in (2, 10):
        source = tmp_path / f"source {layers}"
        source.mkdir()
        config = GriffinConfig(**sizes, num_hidden_layers=layers)
        WRITERS[kind](source, config, noise)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        tracemalloc.start()
        convert(source, tmp_path / f"out {layers}", quantize=True, **SAID)
        peaks.append(mx.get_peak_memory() - before + tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        totals.append(sum(2 * wanted.size for wanted in expected_tensors(config)))
    assert peaks[1] - peaks[0] < 0.05 * (totals[1] - totals[0])


@pytest.mark.parametrize("source", SOURCES)
def test_loading_says_to_convert_first(source):
    for work in (load, load_model):
        with pytest.raises(CheckpointError) as error:
            work(source)
        assert f"convert it first: mlx_rgemma.convert --hf-path {source}" in str(error.value)


def test_without_tensorstore(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    with pytest.raises(CheckpointError, match=r"pip install '\.\[flax\]'"):
        convert(FLAX["orbax-0.5.9-zarr"], tmp_path / "out", **SAID)


@needs_tensorstore
def test_a_list_that_names_more_arrays(tmp_path):
    """Blocks at the end that were not downloaded do not make a smaller model."""
    source = flax_copy("orbax-0.5.9-zarr", tmp_path / "source")
    for path in source.glob("blocks.4.*"):
        shutil.rmtree(path)
    with pytest.raises(CheckpointError, match=r"of \d+ arrays missing: blocks.4"):
        convert(source, tmp_path / "out", **SAID)


@needs_tensorstore
def test_missing_chunk_is_not_zeros(tmp_path):
    source = flax_copy("orbax-0.5.9-zarr", tmp_path / "source")
    (source / "final_norm.scale" / "0").unlink()
    with pytest.raises(CheckpointError, match=r"final_norm.scale cannot be read \(NOT_FOUND"):
        convert(source, tmp_path / "out", **SAID)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@needs_tensorstore
@pytest.mark.parametrize("layers_around", [1, 2])
def test_flax_folder_inside_a_folder(tmp_path, layers_around, expected):
    """As Kaggle's archives unpack: a folder beside the tokenizer; Orbax may add a level."""
    inner = tmp_path / "source" / "/".join(["tiny", "default"][:layers_around])
    flax_copy("orbax-0.5.9-ocdbt", inner)
    convert(tmp_path / "source", tmp_path / "out", **SAID)
    assert_same_tensors(all_tensors(tmp_path / "out"), expected)


@pytest.fixture
def released(monkeypatch):
    """Have tiny-2b's shape be that of a released model."""
    config = GriffinConfig.from_dict(json.loads((GOLDEN / "tiny-2b" / CONFIG).read_text()))
    monkeypatch.setattr(google, "PRESETS", {"2b": config})


ARCHIVES = {
    "2b-it.pt": ("2b-it.pt", "recurrentgemma-2b-it"),
    "2b.pt": ("2b.pt", "recurrentgemma-2b"),
}


@pytest.mark.usefixtures("released")
@pytest.mark.parametrize(("file", "name"), ARCHIVES.values(), ids=ARCHIVES)
def test_archive_as_released(tmp_path, file, name, expected):
    """A .pt and a tokenizer.model in a tar.gz: a chat model gets its template, a base one not."""
    shutil.copyfile(TORCH, tmp_path / file)
    train(tmp_path / "tokenizer.model", **GEMMA_LIKE)
    archive = tar_of(tmp_path / "archive.tar.gz", tmp_path / file, tmp_path / "tokenizer.model")
    made = convert(archive, tmp_path / "out")
    assert any("the released 2B" in note for note in made.notes)
    assert_same_tensors(all_tensors(tmp_path / "out"), expected)
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert f"# {name} in MLX" in (tmp_path / "out" / "README.md").read_text()
    assert f"base_model: google/{name}" in (tmp_path / "out" / "README.md").read_text()
    _, tokenizer = load(tmp_path / "out")
    assert bool(tokenizer.has_chat_template) == name.endswith("-it")


def test_command_says_what_it_took(tmp_path, capsys):
    arguments = ["--hf-path", str(TORCH), "--mlx-path", str(tmp_path / "out")]
    options = ["--attention-window-size", "16", "--logits-soft-cap", "30", "--embeddings-scale"]
    assert main([*arguments, *options]) == 0
    printed = capsys.readouterr().out
    assert "Note: This is a checkpoint in Google's PyTorch format." in printed
    assert "Note: Attention window 16, soft cap 30, embeddings scaled: from the options" in printed


def test_relative_path(tmp_path):
    """A .pt file named from its own folder, with the tokenizer beside it."""
    shutil.copyfile(TORCH, tmp_path / "x.pt")
    train(tmp_path / "tokenizer.model", **GEMMA_LIKE)
    options = ["--attention-window-size", "16", "--logits-soft-cap", "30", "--no-embeddings-scale"]
    done = subprocess.run(
        [sys.executable, "-m", "mlx_rgemma.convert", "--hf-path", "x.pt", *options],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=dict(os.environ),
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mlx_model" / "tokenizer.json").is_file()
