"""Engines: the same weights in each, their figures, their refusals, their processes."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from benchmarks.harness.engines import MLX_LM, OURS, TRANSFORMERS, Unsupported, make_engine
from benchmarks.harness.hf_export import in_mlx_layout, write_copy, write_random
from benchmarks.harness.processes import Worker, WorkerError
from benchmarks.harness.worker import serve
from mlx_rgemma.evaluation.random_model import (
    SHAPES,
    UNQUANTIZED,
    random_model,
    random_weights,
    recipe,
)

TINY = SHAPES["micro"]
PARAMETERS = sum(w.size for _, w in random_weights(TINY, mx.float32))
TOKENS = [[int(t) for t in np.random.default_rng(0).integers(0, 512, 24)]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("weights")
    write_random(place, TINY, "float32")
    return {"folder": str(place)}


def test_shapes():
    sizes = {
        name: sum(w.size for _, w in random_weights(SHAPES[name], mx.float32))
        for name in ("micro", "40m", "2b", "9b")
    }
    assert sizes["40m"] == 39_686_656
    assert sizes["2b"] == 2_682_862_080 and sizes["9b"] == 8_579_977_216


def test_random_weights_do_not_vanish_and_forget_as_in_training():
    weights = dict(random_weights(replace(TINY, hidden_size=128, lru_width=128), mx.float32))
    for name, weight in weights.items():
        assert mx.isfinite(weight).all() and weight.std() > 0, name
    a8 = mx.exp(-8 * mx.logaddexp(weights[_recurrent()], 0))
    assert a8.min() >= 0.9 and a8.max() <= 0.999


def _recurrent() -> str:
    return "model.layers.0.temporal_block.rg_lru.recurrent_param"


def test_random_models_are_the_same_in_memory_and_on_disk(folder):
    from mlx_rgemma import load_model

    model, _ = load_model(folder["folder"], dtype="float32")
    expected = dict(tree_flatten(random_model(TINY, mx.float32).parameters()))
    for name, value in tree_flatten(model.parameters()):
        assert mx.array_equal(value, expected[name]), name


def test_a_copy_in_the_layout_of_all(folder, tmp_path):
    from mlx_rgemma.io.hub import EMBEDDED

    assert in_mlx_layout(EMBEDDED) and not in_mlx_layout(Path(folder["folder"]))
    write_copy(tmp_path / "copy", EMBEDDED)
    assert not in_mlx_layout(tmp_path / "copy")
    ours, theirs = make_engine(OURS), make_engine(MLX_LM)
    for engine, source in ((ours, EMBEDDED), (theirs, tmp_path / "copy")):
        assert engine.load({"folder": str(source)}, None, UNQUANTIZED).vocab_size == 2048
    a, b = (
        dict(tree_flatten(ours.model.parameters())),
        dict(tree_flatten(theirs.model.parameters())),
    )
    assert a.keys() == b.keys()
    assert all(mx.array_equal(a[name], b[name].astype(a[name].dtype)) for name in a)


@pytest.mark.parametrize("peer", [MLX_LM, TRANSFORMERS])
def test_peers_run_the_same_weights(folder, peer):
    if peer == TRANSFORMERS:
        pytest.importorskip("torch", reason="needs the extra: pip install '.[parity]'")
    ours, theirs = make_engine(OURS), make_engine(peer)
    loaded = [engine.load(folder, "float32", UNQUANTIZED) for engine in (ours, theirs)]
    assert loaded[0] == loaded[1]
    expected = np.array(ours.model(mx.array(TOKENS)))
    if peer == MLX_LM:
        found = np.array(theirs.model(mx.array(TOKENS)))
    else:
        import torch

        with torch.inference_mode():
            found = theirs.model(torch.tensor(TOKENS)).logits.numpy()
    assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize("name", [OURS, MLX_LM, TRANSFORMERS])
def test_generating_and_training(folder, name):
    if name == TRANSFORMERS:
        pytest.importorskip("torch", reason="needs the extra: pip install '.[parity]'")
    engine = make_engine(name)
    engine.load(folder, "float32", UNQUANTIZED)
    for batch in (1, 2):
        found = engine.generate(TOKENS * batch, 5, 16)
        assert found.tokens == 5 and 0 < found.first_token_s < found.last_token_s
        assert found.state_bytes > 0
    before = _embedding(engine)
    assert engine.train([row[:9] for row in TOKENS], "full") > 0
    assert np.abs(_embedding(engine) - before).max() > 0
    peak = engine.peak_memory()
    assert peak is None if name == TRANSFORMERS else peak > before.nbytes


def _embedding(engine) -> np.ndarray:
    weight = engine.model.model.embed_tokens.weight
    return np.array(weight if isinstance(weight, mx.array) else weight.tolist())


@pytest.mark.parametrize("name", [OURS, MLX_LM])
def test_generation_after_a_long_text_continues_it(folder, name):
    engine = make_engine(name)
    engine.load(folder, "float32", UNQUANTIZED)
    read = []
    for _ in range(3):
        found = engine.generate_after(40, 3, 16)
        (cache,) = engine.states.values()
        read.append(next(c.offset for c in cache if getattr(c, "offset", 0)))
    assert found.tokens == 3 and found.state_bytes == sum(layer.nbytes for layer in cache)
    assert read == read[:1] * 3 and read[0] >= 40  # every trial begins after as many tokens


@pytest.mark.parametrize("name", [OURS, MLX_LM])
def test_lora_trains_little(folder, name):
    engine = make_engine(name)
    engine.load(folder, "float32", "4")
    with pytest.raises(Unsupported, match="with LoRA only"):
        engine.train(TOKENS, "full")
    engine.train(TOKENS, "lora")
    trained = sum(v.size for _, v in tree_flatten(engine.model.trainable_parameters()))
    assert 0 < trained < 60_000


def test_what_is_held_in_float32_is_read_in_float32(folder, monkeypatch):
    engine = make_engine(OURS)
    plain = engine.load(folder, "float32", UNQUANTIZED)
    assert plain.read_bytes == plain.weight_bytes
    monkeypatch.setenv("MLX_RGEMMA_DEQUANTIZE", "off")
    packed = engine.load(folder, "float32", "4")
    assert packed.read_bytes == packed.weight_bytes < plain.weight_bytes
    monkeypatch.delenv("MLX_RGEMMA_DEQUANTIZE")
    held = engine.load(folder, "float32", "4")
    assert held.weight_bytes == packed.weight_bytes
    expanded = engine.model.dequantized_nbytes  # none on a GPU
    assert held.read_bytes == (plain.read_bytes if expanded else packed.read_bytes)


def test_transformers_refuses_what_it_cannot(folder):
    pytest.importorskip("torch", reason="needs the extra: pip install '.[parity]'")
    engine = make_engine(TRANSFORMERS)
    with pytest.raises(Unsupported, match="no MLX quantization"):
        engine.load(folder, "float32", "4")
    with pytest.raises(Unsupported, match="LoRA"):
        engine.train(TOKENS, "lora")


def test_labels_of_quantizations():
    assert recipe("none") is None
    assert recipe("5").of("model.layers.0.x", 3).bits == 5
    assert recipe("mxfp4").default.mode == "mxfp4" and recipe("rgemma").name == "rgemma"
    for label in ("affine", "1", "four", ""):
        with pytest.raises(ValueError, match="expected one of none, 2, 3"):
            recipe(label)


def ask(*requests):
    answers = io.StringIO()
    serve(OURS, io.StringIO("".join(json.dumps(r) + "\n" for r in requests)), answers)
    return [json.loads(line) for line in answers.getvalue().splitlines()]


def test_the_worker_answers_every_request(folder, tmp_path):
    load = {"do": "load", "model": folder, "dtype": "float32", "quantization": "none"}
    answers = ask(
        {"do": "describe"},
        {**load, "model": {"folder": str(tmp_path / "nope")}},
        {"do": "nonsense"},
        load,
        {"do": "generate", "prompts": TOKENS, "tokens": 2, "step_size": 16},
    )
    assert answers[0]["answer"]["packages"]["mlx-rgemma"]
    assert "no such folder" in answers[1]["error"]
    assert "nonsense" in answers[2]["error"]
    assert answers[3]["answer"]["weight_bytes"] == 4 * PARAMETERS
    assert answers[4]["answer"]["tokens"] == 2
    assert answers[4]["answer"]["process_peak_bytes"] > answers[4]["answer"]["peak_memory_bytes"]


def test_a_process_that_dies_is_an_error_with_its_signal():
    with Worker(OURS) as worker:
        worker.process.kill()
        with pytest.raises(WorkerError, match="by signal 9 during describe"):
            worker.request("describe")
