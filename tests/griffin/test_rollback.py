"""Taking back the last tokens: exact, bounded, and never promised in vain."""

from __future__ import annotations

import copy

import mlx.core as mx
import numpy as np
import pytest
from helpers.assertions import max_error
from helpers.models import MODELS, golden_model

STATE_ATOL = 1e-4
"""float32 logits behind a state that has read the same tokens in other calls."""


@pytest.mark.parametrize("name", MODELS)
def test_a_trimmed_state_is_that_of_the_tokens_that_stayed(name):
    """Calls of any lengths, trims of any lengths the history reaches, copies in between."""
    model, rng = golden_model(name), np.random.default_rng(0)
    for _ in range(2):
        cache, stayed = model.make_cache(), []
        for layer in cache:
            layer.enable_rollback(8)
        while len(stayed) < 40:
            tokens = rng.integers(3, 96, rng.integers(1, 7)).tolist()
            model(mx.array([tokens]), cache=cache)
            stayed += tokens
            back = int(rng.integers(0, min(8, cache[0].trimmable) + 1))
            assert [layer.trim(back) for layer in cache] == [back] * len(cache)
            stayed = stayed[: len(stayed) - back]
            if rng.random() < 0.3:
                cache = copy.deepcopy(cache)
        plain = model.make_cache()
        for token in stayed:
            model(mx.array([[token]]), cache=plain)
        assert cache[0].positions == plain[0].positions
        found, expected = (model(mx.array([[5]]), cache=c) for c in (cache, plain))
        assert max_error(found, np.array(expected)) < STATE_ATOL


def test_whole_calls_are_taken_back_bit_by_bit():
    model = golden_model("tiny-2b")
    cache = model.make_cache(2)
    model(mx.array([[2, 3, 4], [5, 6, 7]]), cache=cache)
    for layer in cache:
        layer.enable_rollback(4)
    before = [[np.array(a) for a in layer.state] for layer in cache]
    heads = [getattr(layer, "head", None) for layer in cache]
    for call in ([[8], [9]], [[1, 2], [3, 4]], [[5], [5]]):
        model(mx.array(call), cache=cache)
    for layer in cache:
        layer.trim(4)
    after = [[np.array(a) for a in layer.state] for layer in cache]
    assert [getattr(layer, "head", None) for layer in cache] == heads
    for a, b in zip(before, after, strict=True):
        for x, y in zip(a, b, strict=True):
            assert np.array_equal(x, y)


def test_a_cache_never_promises_what_it_cannot_take_back():
    model = golden_model("tiny-2b")
    cache = model.make_cache()
    model(mx.array([[2, 3, 4]]), cache=cache)
    assert not any(layer.is_trimmable() for layer in cache)
    for layer in cache:
        with pytest.raises(ValueError, match="cannot take back 1 tokens: 0 are kept"):
            layer.trim(1)
        layer.enable_rollback(3)
    assert not any(layer.is_trimmable() for layer in cache)  # nothing has been read since
    model(mx.array([[2, 3]]), cache=cache)
    assert all(layer.is_trimmable() and layer.trimmable == 2 for layer in cache)
    for layer in cache:
        with pytest.raises(ValueError, match="cannot take back 3 tokens: 2 are kept"):
            layer.trim(3)
    model(mx.array([[2] * 9]), cache=cache)  # a call longer than the history
    assert not any(layer.is_trimmable() for layer in cache)
    model(mx.array([[2]]), cache=cache)
    for layer in cache:
        layer.filter([0, 0])
    assert not any(layer.is_trimmable() for layer in cache)
    with pytest.raises(ValueError, match="a window of 16 cannot keep 17 tokens"):
        next(c for c in cache if hasattr(c, "window")).enable_rollback(17)


def test_a_history_does_not_grow():
    model = golden_model("tiny-9b")
    cache = model.make_cache()
    for layer in cache:
        layer.enable_rollback(5)
    for length in (1, 2, 1, 1, 3, 1, 1, 1, 4, 5, 1):
        model(mx.array([[3] * length]), cache=cache)
        assert all(layer.trimmable <= 9 and len(layer.history.calls) <= 5 for layer in cache)
    assert cache[0].trimmable >= 5
