"""Prompt-cache files: exact, whole or absent, and refused when they do not belong."""

from __future__ import annotations

import copy

import mlx.core as mx
import numpy as np
import pytest
from helpers.models import golden_model

from mlx_rgemma import load_prompt_cache, save_prompt_cache
from mlx_rgemma.errors import CheckpointError
from mlx_rgemma.sessions.prompt_cache import fingerprint


def used_cache(model, length: int = 30, rows: int = 1):
    cache = model.make_cache(rows)
    tokens = np.random.default_rng(1).integers(3, 90, (rows, length))
    model(mx.array(tokens), cache=cache)
    return cache


@pytest.mark.parametrize("length", [1, 3, 15, 16, 40])
@pytest.mark.parametrize("rows", [1, 3])
def test_round_trip_is_bit_exact(model_name, length, rows, tmp_path):
    model = golden_model(model_name)
    cache = used_cache(model, length, rows)
    save_prompt_cache(tmp_path / "c.safetensors", model, cache, {"note": "ü"})
    loaded = load_prompt_cache(tmp_path / "c.safetensors", model)
    for _ in range(3):
        tokens = mx.array([[5, 6]] * rows)
        expected = np.array(model(tokens, cache=cache))
        assert np.array_equal(np.array(model(tokens, cache=loaded)), expected)


def test_the_same_checkpoint_has_one_fingerprint_in_every_precision():
    import mlx.nn as nn

    model = golden_model("tiny-sharded")
    quantized = golden_model("tiny-sharded", mx.bfloat16)
    nn.quantize(quantized, group_size=32, bits=8)
    assert fingerprint(quantized) == fingerprint(model)
    assert fingerprint(golden_model("tiny-sharded", window="hf")) != fingerprint(model)
    assert fingerprint(golden_model("tiny-9b")) != fingerprint(model)


def test_states_of_other_models_are_refused(tmp_path):
    model = golden_model("tiny-2b")
    file = tmp_path / "c.safetensors"
    other = copy.deepcopy(model)
    other.model.final_norm.weight = other.model.final_norm.weight + 1.0
    for stranger, message in (
        (golden_model("tiny-9b"), "belongs to another model or window"),
        (golden_model("tiny-2b", window="hf"), "belongs to another model or window"),
        (golden_model("tiny-2b", attention_window_size=17), "another model or window"),
        (golden_model("tiny-2b", num_hidden_layers=4), "has 5 layers, the cache 4"),
        (other, "saved by another model"),
    ):
        save_prompt_cache(file, stranger, used_cache(stranger))
        with pytest.raises(CheckpointError, match=message) as error:
            load_prompt_cache(file, model)
        assert str(error.value).startswith(str(file))
        assert "\n" not in str(error.value)


def test_damaged_and_foreign_files_are_refused(tmp_path):
    model = golden_model("tiny-2b")
    file = tmp_path / "c.safetensors"
    save_prompt_cache(file, model, used_cache(model))
    whole = file.read_bytes()
    rng = np.random.default_rng(0)
    for size in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            load_prompt_cache(file, model)
    for _ in range(40):  # flips in the header: refused, or harmless
        damaged = bytearray(whole)
        damaged[rng.integers(0, 2500)] ^= 1 << rng.integers(0, 8)
        file.write_bytes(bytes(damaged))
        try:
            model.check_cache(load_prompt_cache(file, model))
        except CheckpointError as error:
            assert "\n" not in str(error)
    mx.save_safetensors(str(file), {"a": mx.zeros((3,))})
    with pytest.raises(CheckpointError, match="not a prompt cache"):
        load_prompt_cache(file, model)
    with pytest.raises(CheckpointError, match="missing"):
        load_prompt_cache(tmp_path / "missing.safetensors", model)


@pytest.mark.parametrize("message", ["[write] Unable to write 99 bytes", "[metal] no memory"])
def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch, message):
    model = golden_model("tiny-2b")
    file = tmp_path / "c.safetensors"
    save_prompt_cache(file, model, used_cache(model))
    before = file.read_bytes()

    def fail(*args, **kwargs):
        raise RuntimeError(message)

    monkeypatch.setattr(mx, "save_safetensors", fail)
    with pytest.raises((CheckpointError, RuntimeError), match=message.split("]")[1]) as error:
        save_prompt_cache(file, model, used_cache(model, 3))
    assert isinstance(error.value, CheckpointError) == message.startswith("[write]")
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]
