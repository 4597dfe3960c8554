"""A model cut into parts, whose processes are threads here: `test_launch` has real ones."""

from __future__ import annotations

from copy import copy
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.assertions import LOGITS_ATOL, max_error
from helpers.models import GOLDEN, golden, golden_model
from helpers.random_models import CONFIG, TOKENS, random_model, read
from helpers.thread_group import ThreadGroup, run_threads
from mlx.utils import tree_flatten

from mlx_rgemma import GriffinConfig, Model
from mlx_rgemma.checkpoints.formats.huggingface import CheckpointFolder
from mlx_rgemma.checkpoints.sharded_reader import read_shards
from mlx_rgemma.errors import UserError
from mlx_rgemma.griffin.sharding import (
    gather_state,
    local_shard,
    shard_axis,
    shard_model,
    split_state,
    valid_world_sizes,
)
from mlx_rgemma.sessions.prompt_cache import load_prompt_cache, save_prompt_cache


def copies(size: int, make=random_model) -> list[Model]:
    """Models for as many threads, in which nothing is left for another thread to compute."""
    models = [make() for _ in range(size)]
    for model in models:
        mx.eval(model.parameters(), model(TOKENS))
    return models


def sharded(models: list[Model], group) -> Model:
    """This thread's model, cut."""
    model = models[group.rank()]
    model.shard(group)
    mx.eval(model.parameters())
    model.fuse_projections()
    return model


@pytest.mark.parametrize("size", [2, 4])
def test_golden_logits(size):
    data = golden("decode/tiny-sharded.npz")
    tokens = mx.array(data["tokens"])
    models = copies(size, lambda: golden_model("tiny-sharded", fuse=False))

    def work(group):
        return np.array(sharded(models, group)(tokens))

    for logits in run_threads(size, work):
        assert max_error(logits, data["google_full"]) < LOGITS_ATOL


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    "quantized",
    [
        None,
        {"group_size": 32, "bits": 4},
        {"group_size": 32, "bits": 3},
        {"group_size": 32, "bits": 4, "mode": "mxfp4"},
        {"group_size": 16, "bits": 4, "mode": "nvfp4"},
    ],
    ids=["plain", "4-bit", "3-bit", "mxfp4", "nvfp4"],
)
def test_parts_together_are_the_model(size, quantized):
    expected = read(random_model(quantized), (12,))
    assert np.abs(expected).max() > 1
    models = copies(size, lambda: random_model(quantized))

    def work(group):
        model = sharded(models, group)
        return read(model, (12,)), read(model, (5, 1, 1, 3, 1, 1))

    for full_pass, in_chunks in run_threads(size, work):
        assert max_error(full_pass, expected) < LOGITS_ATOL
        assert max_error(in_chunks, expected) < LOGITS_ATOL


@pytest.mark.parametrize("size", [2, 3, 6])
@pytest.mark.parametrize("quantized", [None, {"group_size": 32, "bits": 8}], ids=["plain", "8-bit"])
def test_other_numbers_of_heads_and_a_wide_recurrence(size, quantized):
    config = replace(
        CONFIG, num_attention_heads=6, hidden_size=192, lru_width=384, intermediate_size=768
    )

    def make():
        return random_model(quantized, config)

    expected = read(make(), (12,))
    models = copies(size, make)
    for logits in run_threads(size, lambda group: read(sharded(models, group), (10, 1, 1))):
        assert max_error(logits, expected) < LOGITS_ATOL


def test_each_process_keeps_its_share():
    whole = sum(value.nbytes for _, value in tree_flatten(random_model().parameters()))
    shared = {
        name: value.nbytes
        for name, value in tree_flatten(random_model().parameters())
        if shard_axis(name) is None
    }
    assert {name.split(".")[-2] for name in shared} == {
        "embed_tokens", "final_norm", "temporal_pre_norm", "channel_pre_norm",
        "k_proj", "v_proj", "linear_out", "o_proj", "down_proj",
    }  # fmt: skip
    assert all(n.endswith("bias") for n in shared if ".linear_out." in n or ".down_proj." in n)

    models = copies(4)

    def work(group):
        model = sharded(models, group)
        cache = model.make_cache()
        own = sum(value.nbytes for _, value in tree_flatten(model.parameters()))
        return own, sum(c.nbytes for c in cache), cache[2].nbytes

    rest = sum(shared.values())
    ring = random_model().make_cache()[2].nbytes
    state = sum(c.nbytes for c in random_model().make_cache())
    for own, own_state, own_ring in run_threads(4, work):
        assert own == rest + (whole - rest) // 4
        assert own_ring == ring and own_state == ring + (state - ring) // 4


def test_bytes_sent_for_a_token():
    """Two sums a layer, of the width of the stream in the dtype of the weights: nothing else."""

    def bfloat16():
        model = random_model()
        model.set_dtype(mx.bfloat16)
        return model

    models = copies(2, bfloat16)

    def work(group):
        model = sharded(models, group)
        cache = model.make_cache()
        mx.eval(model(TOKENS[:1, :5], cache=cache))
        prompt = list(group.exchange.sums)
        group.exchange.barrier.wait()
        group.exchange.sums.clear()
        group.exchange.barrier.wait()
        mx.eval(model(TOKENS[:1, 5:6], cache=cache))
        return prompt, list(group.exchange.sums), list(group.exchange.gathers)

    prompt, decode, gathered = run_threads(2, work)[0]
    assert decode == [CONFIG.hidden_size * 2] * (2 * CONFIG.num_hidden_layers)
    assert prompt == [5 * n for n in decode] and gathered == []


@pytest.mark.parametrize(
    "preset, sizes",
    [("2b", [1, 2, 5, 10]), ("9b", [1, 2, 4, 8, 16])],
)
def test_sizes_that_share_the_released_models(preset, sizes):
    """The numbers of the documentation, of shapes only: nothing is computed."""
    model = Model(GriffinConfig.preset(preset))
    assert valid_world_sizes(model) == sizes
    nn.quantize(model, group_size=64, bits=4, class_predicate=model.quant_predicate)
    assert valid_world_sizes(model) == sizes


def test_groups_of_quantized_weights_are_not_cut():
    assert valid_world_sizes(random_model()) == [1, 2, 4]
    assert valid_world_sizes(random_model({"group_size": 64, "bits": 4})) == [1, 2]
    assert valid_world_sizes(random_model({"group_size": 128, "bits": 4})) == [1]


@pytest.mark.parametrize("size", [3, 8])
def test_a_number_of_processes_that_does_not_divide_is_refused(size):
    model = random_model()
    group = ThreadGroup(0, size, None)
    with pytest.raises(UserError, match=rf"^{size} processes .* 4 heads .* can: 2, 4\.$"):
        model.shard(group)
    assert model.group is None and max_error(model(TOKENS), np.array(random_model()(TOKENS))) == 0


def test_a_model_is_sharded_once():
    models = copies(2)

    def work(group):
        model = sharded(models, group)
        with pytest.raises(ValueError, match="already"):
            model.shard(group)

    run_threads(2, work)


def test_states_are_exchanged_with_one_process(tmp_path):
    whole = random_model()
    cache = whole.make_cache()
    whole(TOKENS[:1, :9], cache=cache)
    path = tmp_path / "one.safetensors"
    save_prompt_cache(path, whole, cache)
    bits = {name: np.array(value) for name, value in mx.load(str(path)).items()}

    loaded = load_prompt_cache(path, whole)
    mx.eval([layer.state for layer in loaded])
    models = copies(4)

    def work(group):
        model = sharded(models, group)
        parts = split_state([copy(layer) for layer in loaded], group.rank(), 4)
        model.check_cache(parts)
        again = [copy(layer) for layer in gather_state(parts, group)]
        mx.eval([layer.state for layer in again])
        logits = model(TOKENS[:1, 9:10], cache=parts)
        return again, np.array(logits)

    results = run_threads(4, work)
    expected = np.array(whole(TOKENS[:1, 9:10], cache=cache))
    for again, logits in results:
        assert max_error(logits, expected) < LOGITS_ATOL
        save_prompt_cache(tmp_path / "again.safetensors", whole, again)
        saved = mx.load(str(tmp_path / "again.safetensors"))
        for name, value in bits.items():
            assert np.array_equal(np.array(saved[name]), value), name


def test_a_state_of_one_process_does_not_fit_a_sharded_model():
    models = copies(4)
    cache = models[0].make_cache()

    def work(group):
        model = sharded(models, group)
        with pytest.raises(ValueError, match="width 32"):
            model.check_cache(cache)

    run_threads(4, work)


@pytest.mark.parametrize("rank", [0, 1])
def test_parts_are_read_from_the_files_as_they_would_be_cut(rank):
    folder = CheckpointFolder.open(GOLDEN / "tiny-sharded")
    whole = golden_model("tiny-sharded", mx.bfloat16, fuse=False)
    weights: dict[str, mx.array] = {}
    for file in folder.files:
        weights.update(mx.load(str(file)))
    parts = read_shards(whole.sanitize(weights), folder.tensors, rank, 2)
    cut = 0
    for name, value in tree_flatten(whole.parameters()):
        expected = local_shard(name, value, rank, 2)
        assert parts[name].shape == expected.shape and parts[name].dtype == mx.bfloat16, name
        assert mx.array_equal(parts[name], expected).item(), name
        cut += expected.size < value.size
    assert cut > 0.7 * len(parts)


def test_unloaded_models_are_sharded_without_computing_anything():
    model = Model(GriffinConfig.preset("9b"))
    before = mx.get_active_memory()
    shard_model(model, ThreadGroup(1, 4, None))
    layer = model.layers[0].temporal_block
    assert layer.linear_x.weight.shape == (1024, 4096)
    assert layer.linear_out.weight.shape == (4096, 1024)
    assert layer.rg_lru.input_gate_weight.shape == (4, 256, 256)
    assert layer.conv_1d.weight.shape == (1024, 4, 1)
    assert model.layers[2].temporal_block.num_heads == 4
    assert model.layers[2].temporal_block.k_proj.weight.shape == (256, 4096)
    assert mx.get_active_memory() - before < 1e6
