"""Decode steps by Numba kernels: Google's logits, the model's state, and only where supported."""

from __future__ import annotations

import copy

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.assertions import LOGITS_ATOL, max_error
from helpers.models import golden, golden_model
from helpers.random_models import CONFIG
from mlx.utils import tree_flatten

from mlx_rgemma import Model
from mlx_rgemma.cpu import decode_step, dequantize, numba_runtime, thread_pool
from mlx_rgemma.generation.decode import generate_step
from mlx_rgemma.generation.speculative import SpeculationStats, speculative_steps
from mlx_rgemma.griffin.cache import RecurrentCache
from mlx_rgemma.ops import backend
from mlx_rgemma.ops.backend import Backend
from mlx_rgemma.tuner.init import initialize


@pytest.fixture
def steps(monkeypatch) -> list[int]:
    """The tokens that the kernels have read, of all sequences; small models are worth them."""
    tokens: list[int] = []
    step = decode_step.Decoder._step

    def noted(self, ids, cache, last_only):
        tokens.extend(token for sequence in ids for token in sequence)
        return step(self, ids, cache, last_only)

    monkeypatch.setattr(decode_step, "MIN_WEIGHTS", 1)
    monkeypatch.setattr(decode_step, "WEIGHTS_PER_THREAD", 1)
    monkeypatch.setattr(decode_step.Decoder, "_step", noted)
    return tokens


def evaluated(name: str, **changes) -> nn.Module:
    model = golden_model(name, **changes)
    model.eval()
    return model


def plainly(compute):
    """Results of the references."""
    with backend.use(Backend.MLX):
        return compute()


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_logits_are_googles(model_name, steps, monkeypatch, threads, rows):
    """Token by token from the second on, far beyond the window."""
    workers = [thread_pool._Worker(number) for number in range(1, threads)]
    monkeypatch.setattr(thread_pool, "_workers", lambda: workers)
    monkeypatch.setattr(numba_runtime, "num_threads", lambda: threads)
    used = []
    run = numba_runtime.run_region
    monkeypatch.setattr(
        numba_runtime, "run_region", lambda name, n, *rest: (used.append(n), run(name, n, *rest))
    )
    model = evaluated(model_name)
    data = golden(f"decode/{model_name}.npz")
    tokens, expected = data["tokens"][:rows], data["google_full"][:rows]
    assert len(tokens) == rows and tokens.shape[1] > 2 * model.args.attention_window_size
    cache, found = model.make_cache(rows), []
    for column in tokens.T.tolist():
        found.append(np.array(model(mx.array(column)[:, None], cache=cache)))
    assert steps == tokens.T[1:].flatten().tolist()
    assert set(used) == {threads}
    assert max_error(np.concatenate(found, axis=1), expected) < LOGITS_ATOL


@pytest.mark.parametrize(
    "weights, threads", [(1, 1), (1 << 18, 1), (1 << 19, 2), ((1 << 20) - 1, 3), (1 << 30, 4)]
)
def test_how_many_threads_a_layer_is_worth(monkeypatch, weights, threads):
    monkeypatch.setattr(numba_runtime, "max_region_threads", lambda: 4)
    assert decode_step._threads(weights) == threads


@pytest.mark.parametrize("rows", [2, 3, decode_step.MAX_TOKENS])
def test_rows_at_different_places(steps, monkeypatch, rows):
    """Prompts of different lengths, some behind the window; rows that leave, and one that joins."""
    model = evaluated("tiny-2b")
    rng = np.random.default_rng(rows)
    lengths = [1, *rng.integers(2, 60, rows - 1).tolist()]
    prompts = mx.array(rng.integers(0, model.args.vocab_size, (rows, max(lengths))))
    drawn = rng.integers(0, model.args.vocab_size, (50, rows)).tolist()

    def written():
        cache, alone, found = model.make_cache(rows), model.make_cache(1), []
        model(prompts[:1, :7], cache=alone)
        for layer in cache:
            layer.prepare(lengths=lengths)
        model(prompts, cache=cache)
        for layer, other in zip(cache, alone, strict=True):
            layer.finalize()
            layer.filter([*range(1, rows)])
            layer.extend(other)
        for column in drawn:
            found.append(np.array(model(mx.array(column)[:, None], cache=cache)))
        return np.stack(found), [np.array(x) for layer in cache for x in layer.state]

    expected, its_state = plainly(written)
    assert not steps
    found, state = written()
    assert steps == [token for column in drawn for token in column]
    assert np.abs(found - expected).max() < 3e-5
    assert all(np.abs(x - y).max() < 1e-5 for x, y in zip(state, its_state, strict=True))


@pytest.mark.parametrize("rows, few", [(1, (1, 1, 8, 3, 1, 5, 2, 7)), (2, (4, 1, 3, 2, 4, 4))])
def test_a_few_tokens_at_once(model_name, steps, rows, few):
    """After a prompt and before more of it, until far behind the window."""
    model = evaluated(model_name)
    data = golden(f"decode/{model_name}.npz")
    tokens, expected = mx.array(data["tokens"][:rows]), data["google_full"][:rows]
    cache, found, at, sizes = model.make_cache(rows), [], 0, [9, *few]
    while at < tokens.shape[1]:
        size, *sizes = sizes or few
        found.append(np.array(model(tokens[:, at : at + size], cache=cache)))
        at += size
    assert at > 2 * model.args.attention_window_size
    assert len(steps) == rows * (tokens.shape[1] - 9)
    assert max_error(np.concatenate(found, axis=1), expected) < LOGITS_ATOL


@pytest.mark.parametrize("kept", range(5))
def test_tokens_that_are_taken_back(steps, monkeypatch, kept):
    """After drafts, of which some stay, the state is what it is when only those were read."""
    model = evaluated("tiny-2b")
    model.last_logits(mx.array([[1, 2, 3]]), cache := model.make_cache(1))
    for layer in cache:
        layer.enable_rollback(5)
    drafts, stay = np.random.default_rng(kept).integers(0, 90, (20, 5)), []
    for draft in drafts:
        logits = np.array(model(mx.array(draft[None]), cache=cache))
        for layer in cache:
            layer.trim(5 - kept)
        stay += draft[:kept].tolist()
    assert steps == drafts.flatten().tolist()

    def plain():
        other = model.make_cache(1)
        model(mx.array([[1, 2, 3, *stay[: len(stay) - kept]]]), cache=other)
        expected = np.array(model(mx.array(drafts[-1:]), cache=copy.deepcopy(other)))
        if kept:
            model.prefill(mx.array([stay[-kept:]]), other)
        return expected, other

    expected, other = plainly(plain)
    assert np.abs(logits - expected).max() < 3e-5
    for mine, its in zip(cache, other, strict=True):
        assert mine.positions == its.positions
        for name in ("conv", "h") if isinstance(mine, RecurrentCache) else ():
            assert max_error(getattr(mine, name), np.array(getattr(its, name))) < 1e-5
        if not isinstance(mine, RecurrentCache):
            held = min(mine.positions[0], mine.ring.kv.shape[2])
            newest = (c.ring.newest(held) for c in (mine, its))
            assert max_error(next(newest), np.array(next(newest))) < 1e-5


def test_a_text_written_with_drafts(steps):
    """What was drafted is checked by loops, several tokens at once; the text is the model's own."""
    model, prompt = evaluated("tiny-2b"), mx.array([1, 2, 3, 1, 2, 3, 1, 2])
    own = generate_step(prompt, model, prompt_cache=model.make_cache(1), max_tokens=60)
    own = [token for token, *_ in own]
    steps.clear()
    stats = SpeculationStats()
    drafted = speculative_steps(
        prompt,
        model,
        prompt_cache=model.make_cache(1),
        max_tokens=60,
        prompt_lookup=3,
        stats=stats,
    )
    assert [token for token, *_ in drafted] == own
    assert stats.accepted > 0 and stats.passes < 60
    assert len(steps) >= 60 + stats.drafted - stats.accepted


@pytest.mark.parametrize("name", ["last_logits", "prefill"])
def test_the_last_of_a_few_tokens(steps, monkeypatch, name):
    model = evaluated("tiny-2b")
    cache = model.make_cache(2)
    model(mx.array([[1, 2, 3], [4, 5, 6]]), cache=cache)
    tokens = mx.array([[7, 8, 9, 10], [11, 12, 13, 14]])
    heads = []
    monkeypatch.setattr(Model, "head", lambda self, x: heads.append(x))
    expected = model(tokens, cache=copy.deepcopy(cache))
    assert expected.shape == (2, 4, model.args.vocab_size)
    found = getattr(model, name)(tokens, cache)
    assert len(steps) == 16 and not heads
    if name == "last_logits":
        assert mx.array_equal(found, expected[:, -1])
    else:
        assert found is None and cache[0].positions == [7, 7]


def test_the_state_is_the_models_own(steps, monkeypatch):
    model = evaluated("tiny-2b")
    caches = [model.make_cache(1), model.make_cache(1)]

    def read(cache):
        model(mx.array([[1, 2, 3]]), cache=cache)
        return [model.last_logits(mx.array([[token]]), cache) for token in range(4, 90)]

    expected = plainly(lambda: read(caches[0]))
    assert not steps
    found = read(caches[1])
    assert steps == list(range(4, 90))
    assert max(max_error(x, np.array(y)) for x, y in zip(found, expected, strict=True)) < 3e-5
    for mine, its in zip(caches[1], caches[0], strict=True):
        assert mine.positions == its.positions and mine.offset == 89
        for x, y in zip(mine.state, its.state, strict=True):
            assert x.dtype == y.dtype and x.shape == y.shape
            assert max_error(x, np.array(y)) < 1e-5


@pytest.mark.parametrize("rows", [1, 3])
def test_the_ring_is_written_where_it_lies(steps, rows):
    model = evaluated("tiny-2b")
    cache = model.make_cache(rows)
    model.last_logits(mx.array([[1, 2, 3]] * rows), cache)
    ring = next(c for c in cache if hasattr(c, "kv"))

    def place() -> int:
        return np.asarray(ring.kv).__array_interface__["data"][0]

    model.last_logits(mx.array([[4]] * rows), cache)
    first = place()
    for token in range(60):
        model.last_logits(mx.array([[token]] * rows), cache)
        assert place() == first
    assert len(steps) == 61 * rows


def test_a_copy_of_the_state_does_not_change(steps):
    model = evaluated("tiny-2b")
    cache = model.make_cache(1)
    model.last_logits(mx.array([[1, 2, 3]]), cache)
    model.last_logits(mx.array([[4]]), cache)
    copied, held = copy.deepcopy(cache), [x for c in cache for x in c.state]
    before = [np.array(x) for x in held]
    model.last_logits(mx.array([[5]]), cache)
    assert all(np.array_equal(x, y) for x, y in zip(held, before, strict=True))
    kept = [x for c in copied for x in c.state]
    assert all(np.array_equal(x, y) for x, y in zip(kept, before, strict=True))
    after = [x for c in cache for x in c.state]
    assert not any(np.array_equal(x, y) for x, y in zip(after, before, strict=True))
    assert len(steps) == 2


def test_quantized_weights_that_are_held_in_float32(steps, monkeypatch):
    model = Model(CONFIG)
    initialize(model, seed=0)
    model.eval()
    nn.quantize(model, group_size=32, bits=8, class_predicate=model.quant_predicate)
    model.prepare_for_inference(dequantize=False)
    cache = model.make_cache(1)

    def read(cache):
        model(mx.array([[1, 2, 3]]), cache=cache)
        return [np.array(model.last_logits(mx.array([[token]]), cache)) for token in range(4, 20)]

    expected = read(cache)
    assert not steps  # they are packed
    assert dequantize.cache_dequantized(model) > 0
    found = read(model.make_cache(1))
    assert len(steps) == 16
    assert max(np.abs(x - y).max() for x, y in zip(found, expected, strict=True)) < 1e-4


def test_weights_that_are_replaced(steps, monkeypatch):
    """By an update, and by adapters: no step runs on what was before."""
    from mlx_lm.tuner.lora import LoRALinear

    model = evaluated("tiny-2b")

    def logits():
        cache = model.make_cache(1)
        model(mx.array([[1, 2, 3]]), cache=cache)
        return np.array(model.last_logits(mx.array([[4]]), cache))

    first = logits()
    assert len(steps) == 1
    mlp = model.layers[1].mlp_block
    mlp.down_proj.weight = mlp.down_proj.weight * 1.5
    second = logits()
    assert len(steps) == 2 and np.abs(second - first).max() > 1e-3
    assert np.abs(second - plainly(logits)).max() < 1e-5
    mlp.down_proj = LoRALinear.from_base(mlp.down_proj)
    mlp.down_proj.lora_b = mx.ones_like(mlp.down_proj.lora_b)
    third = logits()
    assert len(steps) == 2 and np.abs(third - second).max() > 1e-3


def test_a_model_in_training_mode_uses_none(steps):
    model = evaluated("tiny-2b")
    cache = model.make_cache(1)
    model(mx.array([[1, 2, 3]]), cache=cache)
    model(mx.array([[4]]), cache=cache)
    assert len(steps) == 1 and model._decoder[1] is not None
    model.train()
    model(mx.array([[4]]), cache=cache)
    assert len(steps) == 1
    assert not any("_decoder" in name for name, _ in tree_flatten(model.parameters()))


def test_what_takes_the_models_own_way(steps):
    """The first token, many tokens, packed and padded rows, half precision."""
    one, many = mx.array([[3]]), decode_step.MAX_TOKENS + 1
    model = evaluated("tiny-2b")

    def continued(model, rows=1, prepare=lambda cache: None):
        cache = model.make_cache(rows)
        model(mx.array([[1, 2]] * rows), cache=cache)
        for c in cache:
            prepare(c)
        return cache

    model(one, cache=model.make_cache(1))
    model(one)
    model(mx.array([[3]] * many), cache=continued(model, many))
    late = continued(model, 2)
    for layer, other in zip(late, model.make_cache(1), strict=True):
        layer.filter([0])
        layer.extend(other)
    model(mx.array([[3], [4]]), cache=late)  # the first token of one of two rows
    model(one, cache=continued(model), segment_pos=mx.array([[2]]))
    model(mx.array([[3] * many]), cache=continued(model))
    model(mx.array([[3] * 5] * 3), cache=continued(model, 3))
    narrow = evaluated("tiny-2b", attention_window_size=4)
    assert narrow.args.past_window < 8
    narrow(mx.array([[3] * (narrow.args.past_window + 1)]), cache=continued(narrow))
    model(one, cache=continued(model, prepare=lambda c: c.prepare(lengths=[1])))
    half = evaluated("tiny-2b", dtype=mx.bfloat16)
    half(one, cache=continued(half))
    unjoined = evaluated("tiny-2b", fuse=False)
    unjoined(one, cache=continued(unjoined))
    assert not steps
    for cache in (continued(model)[:-1], continued(model, 2)):
        with pytest.raises(ValueError, match=r"\[cache\]"):
            model(one, cache=cache)
    model(one, cache=continued(model))
    assert steps == [3]


def test_within_a_compiled_function(steps):
    model = evaluated("tiny-2b")
    cache = model.make_cache(1)
    model(mx.array([[1, 2]]), cache=cache)
    copied = copy.deepcopy(cache)
    found = mx.compile(lambda token: model(token, cache=copied))(mx.array([[3]]))
    assert not steps
    assert max_error(found, np.array(model(mx.array([[3]]), cache=cache))) < 1e-5
    assert steps == [3]


def test_small_models_and_no_numba(monkeypatch):
    """A model of fewer than eight million parameters steps as before."""
    model = evaluated("tiny-2b")
    cache = model.make_cache(1)
    model(mx.array([[1, 2]]), cache=cache)
    model(mx.array([[3]]), cache=cache)
    assert model._decoder[1] is None
    monkeypatch.setattr(numba_runtime, "available", lambda: False)
    monkeypatch.setattr(decode_step, "MIN_WEIGHTS", 1)
    model(mx.array([[3]]), cache=cache)
    assert model._decoder[1] is None
