"""Checkpoints to read, break and repair in tests."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx

from helpers.models import GOLDEN

STORIES = (
    (Path(__file__).parents[1] / "checkpoints" / "unseen_stories.txt")
    .read_text()
    .strip()
    .split("\n\n")
)

CONFIG, SINGLE = "config.json", "model.safetensors"
INDEX = "model.safetensors.index.json"

GEMMA_LIKE = {
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "byte_fallback": True,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
    "pad_id": 0,
    "eos_id": 1,
    "bos_id": 2,
    "unk_id": 3,
    "pad_piece": "<pad>",
    "eos_piece": "<eos>",
    "bos_piece": "<bos>",
    "user_defined_symbols": [
        "<mask>",
        "<start_of_turn>",
        "<end_of_turn>",
        *("\n" * n for n in range(1, 6)),
        *("▁" * n for n in range(2, 8)),
        "<table>",
        "</b>",
    ],
}
"""How Google's tokenizer was made, on a small scale."""


def golden_copy(name: str, folder: Path) -> Path:
    """A golden checkpoint that a test may change."""
    target = folder / name
    target.mkdir(parents=True)
    for file in (GOLDEN / name).iterdir():
        shutil.copyfile(file, target / file.name)
    return target


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def edit_tensors(path: Path, **changes: Any) -> None:
    """Change tensors of a safetensors file: to an array, through a function, or None: remove.

    Names are written with `__` for the dots.
    """
    tensors = dict(mx.load(str(path)))
    mx.eval(list(tensors.values()))
    for key, change in changes.items():
        name = key.replace("__", ".")
        value = change(tensors[name]) if callable(change) else change
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    mx.save_safetensors(str(path), tensors, {"format": "pt"})


def all_tensors(folder: Path) -> dict[str, mx.array]:
    """What the weight files of a folder hold."""
    tensors: dict[str, mx.array] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(mx.load(str(file)))
    return tensors


def assert_same_tensors(found: dict[str, mx.array], expected: dict[str, mx.array]) -> None:
    """The same names, dtypes, shapes and bits."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        assert mx.array_equal(found[name].view(mx.uint8), value.view(mx.uint8)).item(), name


def train_sentencepiece(path: Path, **options: Any) -> None:
    """Train a small SentencePiece model on the stories."""
    import sentencepiece

    lines = [line for story in STORIES for line in story.split("\n")]
    lines += ["äöü ß é è 漢字 かな привет мир 12345 67 3.14", "def f(x):\n\treturn  x  +  1"] * 5
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        **{
            "vocab_size": 600,
            "model_type": "bpe",
            "hard_vocab_limit": False,
            "minloglevel": 2,
            "num_threads": 1,
            **options,
        },
    )
    path.write_bytes(model.getvalue())


def run_plain_python(code: str, *arguments: str | Path, **environment: str) -> str:
    """Run code in another process that does not use this package; returns what it prints."""
    check = "\nimport sys; assert 'mlx_rgemma' not in sys.modules, 'not plain'"
    done = subprocess.run(
        [sys.executable, "-c", code + check, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
