"""Conversion beside plain mlx-lm: it runs what we write, and writes what we do."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest
from helpers.assertions import max_error
from helpers.checkpoint_files import CONFIG, all_tensors, assert_same_tensors, run_plain_python
from helpers.models import GOLDEN, golden

from mlx_rgemma import convert, load, load_model
from mlx_rgemma.io.hub import EMBEDDED

PLAIN_LOGITS = """
import sys, mlx.core as mx, numpy as np
from pathlib import Path
from mlx_lm.utils import load_model
tokens = mx.array(np.load(sys.argv[1]))
for folder in sys.argv[2:]:
    model, _ = load_model(Path(folder))
    np.save(folder + ".npy", np.array(model(tokens).astype(mx.float32)))
"""

PLAIN_CONVERT = """
import json, sys
from mlx_lm.convert import convert
for arguments in json.loads(sys.argv[1]):
    convert(**arguments)
"""

PLAIN_ATOL = 0.05
"""mlx-lm's eps of 1e-5 and its unrounded embedding scale move these logits by up to 0.02."""


@pytest.fixture(scope="module")
def plain_mlx_lm(tmp_path_factory):
    """Folders this package wrote, with the logits that plain mlx-lm computes from them."""
    root = tmp_path_factory.mktemp("plain")
    convert(GOLDEN / "tiny-2b", root / "float32", dtype="float32")
    convert(GOLDEN / "tiny-2b", root / "bfloat16")
    convert(GOLDEN / "tiny-2b", root / "quantized", quantize=True, q_group_size=32, dtype="float32")
    convert(GOLDEN / "tiny-2b", root / "nvfp4", quantize=True, q_mode="nvfp4", dtype="float32")
    tokens = golden("decode/tiny-2b.npz")["tokens"]
    np.save(root / "tokens.npy", tokens)
    names = ["float32", "bfloat16", "quantized", "nvfp4"]
    run_plain_python(PLAIN_LOGITS, root / "tokens.npy", *(root / name for name in names))
    return root, mx.array(tokens)


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [("float32", PLAIN_ATOL), ("quantized", PLAIN_ATOL), ("nvfp4", PLAIN_ATOL), ("bfloat16", 0.6)],
)
def test_plain_mlx_lm_runs_it(plain_mlx_lm, name, tolerance):
    root, tokens = plain_mlx_lm
    model, _ = load_model(root / name, dtype="float32", window="hf")
    theirs = np.load(root / f"{name}.npy")
    assert max_error(model(tokens), theirs) < tolerance
    assert np.abs(theirs).max() > 2


def test_plain_mlx_lm_generates(tmp_path):
    """The embedded model, quantized, writes its story in plain mlx-lm too."""
    convert(EMBEDDED, tmp_path / "out", quantize=True, q_bits=8)
    code = """
import sys
from mlx_lm import generate, load
model, tokenizer = load(sys.argv[1])
print(generate(model, tokenizer, "Once upon a time", max_tokens=12))
"""
    assert "there was a little girl" in run_plain_python(code, tmp_path / "out")


@pytest.fixture(scope="module")
def mlx_lm_converted(tmp_path_factory):
    """The embedded model, converted by mlx-lm's own converter."""
    root = tmp_path_factory.mktemp("mlx_lm")
    options = {
        "plain": {},
        "q4": {"quantize": True, "q_bits": 4},
        "q8": {"quantize": True, "q_bits": 8, "q_group_size": 32, "dtype": "float16"},
        "mxfp8": {"quantize": True, "q_mode": "mxfp8"},
        "mixed": {"quantize": True, "quant_predicate": "mixed_3_6", "q_group_size": 64},
    }
    arguments = [
        {"hf_path": str(EMBEDDED), "mlx_path": str(root / name), **values}
        for name, values in options.items()
    ]
    run_plain_python(PLAIN_CONVERT, json.dumps(arguments))
    return root, options


@pytest.mark.parametrize("name", ["plain", "q4", "q8", "mxfp8"])
def test_the_same_as_mlx_lm_s_converter(mlx_lm_converted, tmp_path, name):
    root, options = mlx_lm_converted
    convert(EMBEDDED, tmp_path / "ours", **options[name])
    assert_same_tensors(all_tensors(tmp_path / "ours"), all_tensors(root / name))
    ours, theirs = (
        json.loads((folder / name / CONFIG).read_text()).get("quantization")
        for folder, name in ((tmp_path, "ours"), (root, name))
    )
    assert ours == theirs


def test_mlx_lm_s_mixed_bits_load(mlx_lm_converted):
    model, _ = load_model(mlx_lm_converted[0] / "mixed")
    bits = {m.bits for _, m in model.named_modules() if hasattr(m, "bits")}
    assert bits == {3, 6}
    _, tokenizer = load(mlx_lm_converted[0] / "mixed")
    logits = model(mx.array([tokenizer.encode("Once upon a")]))
    assert tokenizer.decode([logits[0, -1].argmax().item()]).strip() == "time"
