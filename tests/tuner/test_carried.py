"""Carried state: chunk by chunk the same losses as in one pass, and gradients that stop."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.assertions import tolerance
from helpers.models import golden_model
from mlx.utils import tree_flatten

from mlx_rgemma.errors import UserError
from mlx_rgemma.tuner.data.packing import Documents
from mlx_rgemma.tuner.data.tbptt import StatefulBatches, StatefulLoss
from mlx_rgemma.tuner.grad_checkpoint import checkpoint_layers

LENGTHS = (130, 7, 55, 90, 2, 61, 1)


@pytest.fixture(scope="module")
def documents() -> Documents:
    rng = np.random.default_rng(0)
    return Documents.of([rng.integers(3, 90, length) for length in LENGTHS])


def document(documents: Documents, number: int) -> mx.array:
    return mx.array(documents.ids[documents.offsets[number] : documents.offsets[number + 1]])[None]


def whole_loss(model, documents) -> float:
    total = 0.0
    for number, length in enumerate(LENGTHS):
        if length > 1:
            tokens = document(documents, number)
            losses = nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
            total += losses.sum().item()
    return total


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize(("rows", "length"), [(1, 17), (2, 17), (3, 40), (2, 6)])
def test_forward_loss_is_that_of_the_full_pass(documents, rows, length, checkpointing):
    model = golden_model("tiny-9b")
    expected = whole_loss(model, documents)
    model.train()
    if checkpointing:
        checkpoint_layers(model)
    batches, loss = StatefulBatches(documents, rows, length, None), StatefulLoss(model, rows)
    total = count = 0
    for step in range(len(batches)):
        batch = batches[step]
        (value, counted), gradients = nn.value_and_grad(
            model, lambda m, batch=batch: loss(m, batch)
        )(model)
        mx.eval(value, gradients)
        total, count = total + value.item(), count + counted.item()
    assert count == sum(n - 1 for n in LENGTHS)
    assert total == pytest.approx(expected, rel=tolerance(1e-6))


def test_gradients_are_those_of_the_chunk_on_a_given_state(documents):
    model = golden_model("tiny-9b")
    tokens = document(documents, 0)
    batches = StatefulBatches(Documents.of([tokens[0].tolist()]), 1, 40, None)
    model.train()
    loss = StatefulLoss(model, 1)
    for step in range(2):
        batch = batches[step]
        gradients = nn.value_and_grad(model, lambda m, b=batch: loss(m, b)[0])(model)[1]
    cache = model.make_cache()
    mx.eval(model(tokens[:, :40], cache=cache), [layer.state for layer in cache])

    def second(model):
        logits = model(tokens[:, 40:80], cache=cache)
        return nn.losses.cross_entropy(logits, tokens[:, 41:81], reduction="sum")

    expected = nn.value_and_grad(model, second)(model)[1]
    for (name, a), (_, b) in zip(tree_flatten(gradients), tree_flatten(expected), strict=True):
        scale = max(mx.linalg.norm(b).item(), 1e-4)
        assert mx.linalg.norm(a - b).item() / scale < tolerance(5e-5), name


def held_after_steps(documents: Documents) -> list[int]:
    """Bytes that MLX holds after each of many steps."""
    model = golden_model("tiny-9b")
    model.train()
    batches, loss = StatefulBatches(documents, 1, 16, 0), StatefulLoss(model, 1)
    held = []
    for step in range(60):
        batch = batches[step]
        found = nn.value_and_grad(model, lambda m, b=batch: loss(m, b)[0])(model)
        mx.eval(found)
        del found, batch
        mx.synchronize()  # MLX's thread lets go of what it has used a moment after
        held.append(mx.get_active_memory())
    return held


def test_memory_does_not_grow_with_the_document(documents):
    """What a step leaves behind is the state alone: in a process where nothing else has run."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        held = pool.submit(held_after_steps, documents).result(300)
    # Minima: MLX's threads free an array some time after its last use.
    assert min(held[30:]) <= min(held[2:30]) + 1024, held  # less than an array of the state


def test_order(documents):
    """Each row reads whole documents one behind the other; the order follows from seed and step."""
    batches = StatefulBatches(documents, 2, 16, 5)
    streams = np.concatenate([np.array(batches[i].tokens) for i in range(60)], axis=1)
    positions = np.concatenate([np.array(batches[i].segment_pos) for i in range(60)], axis=1)
    texts = {tuple(document(documents, n)[0, :-1].tolist()) for n in range(len(LENGTHS))}
    for row, at in zip(streams, positions, strict=True):
        starts = np.flatnonzero(at == 0)
        for start, stop in pairwise(starts):
            assert tuple(row[start:stop].tolist()) in texts
            assert np.array_equal(at[start:stop], np.arange(stop - start))
    again = StatefulBatches(documents, 2, 16, 5)[37]
    assert mx.array_equal(again.tokens, batches[37].tokens)


def test_too_few_documents(documents):
    with pytest.raises(UserError, match="--batch-size of at most 6"):
        StatefulBatches(documents, 7, 16, 0)
