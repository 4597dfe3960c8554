"""Maps of characters: SentencePiece's own are sound, damaged ones are refused."""

from __future__ import annotations

import base64
import json
import random

import pytest
from helpers.checkpoint_files import train_sentencepiece

from mlx_rgemma.errors import CheckpointError
from mlx_rgemma.tokenizers.charsmap import charsmap_problem
from mlx_rgemma.tokenizers.load import load_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A SentencePiece model that normalizes, and its map."""
    from sentencepiece import sentencepiece_model_pb2

    path = tmp_path_factory.mktemp("map") / "tokenizer.model"
    train_sentencepiece(path)
    return sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())


@pytest.mark.parametrize("rule", ["nfkc", "nmt_nfkc", "nfkc_cf", "nmt_nfkc_cf"])
def test_maps_of_sentencepiece_are_sound(tmp_path, rule):
    from sentencepiece import sentencepiece_model_pb2

    train_sentencepiece(tmp_path / "x", normalization_rule_name=rule)
    proto = sentencepiece_model_pb2.ModelProto.FromString((tmp_path / "x").read_bytes())
    charsmap = proto.normalizer_spec.precompiled_charsmap
    assert len(charsmap) > 10_000 and charsmap_problem(charsmap) is None


DAMAGES = {
    "empty": lambda data: b"",
    "cut in the size": lambda data: data[:3],
    "cut in the trie": lambda data: data[:1000],
    "size": lambda data: b"\xff\xff\xff\x7f" + data[4:],
    "odd size": lambda data: (
        (int.from_bytes(data[:4], "little") - 1).to_bytes(4, "little") + data[4:]
    ),
    "texts cut": lambda data: data[: 4 + int.from_bytes(data[:4], "little")],
    "root": lambda data: data[:4] + b"\xff\xff\xff\x7f" + data[8:],
    "random": lambda data: random.Random(1).randbytes(5000),
    "texts": lambda data: data[:-10] + b"\xff" * 10,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_maps(model, damage):
    assert charsmap_problem(damage(model.normalizer_spec.precompiled_charsmap)) is not None


def test_a_damaged_map_is_refused_in_both_files(model, tmp_path, capfd):
    """Without a word of the library's, which would print where it panicked."""
    folder = tmp_path / "sound"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    load_tokenizer(folder)
    from mlx_rgemma.tokenizers.load import write_converted

    write_converted(folder, folder)
    values = json.loads((folder / "tokenizer.json").read_text())
    step = values["normalizer"]["normalizers"][0]
    broken = random.Random(1).randbytes(500)
    step["precompiled_charsmap"] = base64.b64encode(broken).decode()
    (folder / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="precompiled_charsmap with a trie that is cut off"):
        load_tokenizer(folder)
    step["precompiled_charsmap"] = "not base64"
    (folder / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="precompiled_charsmap that is not base64"):
        load_tokenizer(folder)

    damaged = type(model).FromString(model.SerializeToString())
    damaged.normalizer_spec.precompiled_charsmap = broken
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(damaged.SerializeToString())
    with pytest.raises(CheckpointError, match="precompiled_charsmap with a trie that is cut off"):
        load_tokenizer(folder)
    assert "panicked" not in capfd.readouterr().err
