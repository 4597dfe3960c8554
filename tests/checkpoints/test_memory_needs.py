"""Weights that memory cannot hold are refused before they are read."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest
from helpers.checkpoint_files import golden_copy
from helpers.google_files import SAID, TORCH

from mlx_rgemma import convert, load, load_model
from mlx_rgemma.checkpoints.formats.huggingface import CheckpointFolder
from mlx_rgemma.errors import UserError
from mlx_rgemma.io import memory
from mlx_rgemma.io.hub import EMBEDDED


@pytest.fixture
def available(monkeypatch):
    """Sets the available memory."""

    def choose(nbytes: int) -> None:
        monkeypatch.setattr(memory, "available_memory", lambda: nbytes)

    return choose


def elements(path) -> int:
    return sum(mx.zeros(t.shape).size for t in CheckpointFolder.open(path).tensors.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading(available, dtype):
    needed = elements(EMBEDDED) * {"float32": 4, "bfloat16": 2}[dtype]
    available(needed)
    load_model(EMBEDDED, dtype=dtype)
    available(needed - 1)
    for read in (load, load_model):
        with pytest.raises(
            UserError, match=r"the model needs 0\.\d\d GB of memory, 0\.\d\d GB are"
        ):
            read(EMBEDDED, dtype=dtype)
        read(EMBEDDED, dtype=dtype, lazy=True)


def test_converting(tmp_path, available):
    source = golden_copy("tiny-2b", tmp_path)
    available(1000)
    for path, options in ((source, {}), (TORCH, SAID)):
        with pytest.raises(UserError, match=r"converting model\.embed_tokens needs"):
            convert(path, tmp_path / "out", **options)
        assert [p.name for p in tmp_path.iterdir()] == ["tiny-2b"]
    available(10**9)
    convert(source, tmp_path / "out")


def test_a_sparse_file_of_any_size(tmp_path, monkeypatch):
    """Header, configuration and a file without content say that there are 5 GB of weights."""
    monkeypatch.setattr(memory, "available_memory", lambda: 1_000_000_000)
    source = golden_copy("tiny-2b", tmp_path)
    config = json.loads((source / "config.json").read_text())
    rows = 1 << 24
    config["vocab_size"] = rows
    (source / "config.json").write_text(json.dumps(config))
    path = source / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    at = 0
    for name, entry in header.items():
        if name == "model.embed_tokens.weight":
            entry |= {"dtype": "F32", "shape": [rows, config["hidden_size"]]}
        size = {"F32": 4, "BF16": 2, "F16": 2}[entry["dtype"]]
        for n in entry["shape"]:
            size *= n
        entry["data_offsets"] = [at, at + size]
        at += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    for work in (
        lambda: load_model(source),
        lambda: convert(source, tmp_path / "out"),
    ):
        with pytest.raises(UserError, match=r"needs \d{1,2}\.\d\d GB of memory"):
            work()
