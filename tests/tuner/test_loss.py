"""The chunked loss: Google's gradients, every kind of embedding, bounded memory."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.assertions import tolerance
from helpers.models import GOLDEN, golden, golden_model
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.dora import DoRAEmbedding
from mlx_lm.tuner.lora import LoRAEmbedding

from mlx_rgemma.ops import backend
from mlx_rgemma.ops.backend import Backend
from mlx_rgemma.tuner import loss
from mlx_rgemma.tuner.data.packing import Batch
from mlx_rgemma.tuner.dropout import add_dropout
from mlx_rgemma.tuner.grad_checkpoint import checkpoint_layers
from mlx_rgemma.tuner.loss import batch_loss, head_loss
from mlx_rgemma.tuner.memory_estimate import MAX_LOGIT_CHUNKS


def golden_batch(rows: str) -> tuple[Batch, dict[str, np.ndarray]]:
    data = golden(f"train/batch_{rows}.npz")
    assert set(np.unique(data["loss_mask"])) <= {0.0, 1.0}
    arrays = (mx.array(data[name]) for name in ("tokens", "targets"))
    mask, positions = mx.array(data["loss_mask"] > 0), mx.array(data["segment_pos"])
    return Batch(*arrays, mask, positions), data


def gradients_of(model, batch) -> tuple[mx.array, dict[str, mx.array]]:
    """The mean loss and its gradients."""

    def mean(model):
        loss, count = batch_loss(model, batch)
        return loss / count

    loss, gradients = nn.value_and_grad(model, mean)(model)
    return loss, dict(tree_flatten(gradients))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("rows", ["plain", "packed"])
def test_google_gradients(rows, checkpointing):
    model = golden_model("tiny-9b")
    model.train()
    if checkpointing:
        checkpoint_layers(model)
    batch, data = golden_batch(rows)
    expected = model.sanitize(mx.load(str(GOLDEN / f"train/grads_{rows}.safetensors")))
    loss, gradients = gradients_of(model, batch)
    assert abs(loss.item() - float(data["loss"])) / float(data["loss"]) < tolerance(2e-6)
    assert set(gradients) == set(expected)
    for name, gradient in expected.items():
        norm = mx.linalg.norm(gradient).item()
        if norm > 1e-7:
            error = mx.linalg.norm(gradients[name] - gradient).item() / norm
            assert error < tolerance(2e-5), (name, error)


def embedding(kind: str, vocabulary: int, width: int) -> nn.Module:
    plain = nn.Embedding(vocabulary, width)
    plain.weight = mx.random.normal((vocabulary, width))
    if kind == "quantized":
        return plain.to_quantized(32, 4)
    if kind in ("lora", "dora"):
        plain.freeze()
        adapted = (LoRAEmbedding if kind == "lora" else DoRAEmbedding).from_base(plain, r=4)
        adapted.lora_b = 0.1 * mx.random.normal(adapted.lora_b.shape)
        return adapted
    if kind == "frozen":
        plain.freeze()
    return plain


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("cap", [30.0, 0.0], ids=["capped", "uncapped"])
@pytest.mark.parametrize("kind", ["trained", "frozen", "quantized", "lora", "dora"])
def test_head_loss(kind, cap, training):
    """Against automatic gradients of the whole; 97 words and 53 tokens divide by no chunk."""
    mx.random.seed(0)
    head = embedding(kind, 97, 32)
    x, targets = mx.random.normal((53, 32)), mx.random.randint(0, 97, (53,))

    def whole(parameters, x):
        head.update(parameters)
        logits = head.as_linear(x)
        logits = cap * mx.tanh(logits / cap) if cap else logits
        return 3.0 * nn.losses.cross_entropy(logits, targets, reduction="sum")

    def in_chunks(parameters, x):
        head.update(parameters)
        return 3.0 * head_loss(x, targets, head, cap, training=training, chunk=7)

    parameters = head.trainable_parameters()
    expected = mx.value_and_grad(whole, argnums=(0, 1))(parameters, x)
    found = mx.value_and_grad(in_chunks, argnums=(0, 1))(parameters, x)
    pairs = list(zip(tree_flatten(found), tree_flatten(expected), strict=True))
    assert len(pairs) == 2 + {"trained": 1, "lora": 2, "dora": 3}.get(kind, 0)
    for (name, value), (_, wanted) in pairs:
        assert value.dtype == wanted.dtype
        error = mx.linalg.norm(value - wanted).item() / mx.linalg.norm(wanted).item()
        assert error < tolerance(2e-6), name


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_memory_of_the_head_is_that_of_a_few_chunks(training, trained):
    """MLX's CPU allocates up to 100 operations ahead: a dozen chunks; all would be 64 and 128."""
    vocabulary, width, chunk = 4001, 16, 16
    head = embedding("trained" if trained else "frozen", vocabulary, width)
    mx.eval(head.parameters())
    peaks = []
    for tokens in (64 * chunk, 128 * chunk):
        x, targets = mx.random.normal((tokens, width)), mx.arange(tokens) % vocabulary

        def loss(parameters, x, targets=targets):
            head.update(parameters)
            return head_loss(x, targets, head, 30.0, training=training, chunk=chunk)

        mx.eval(x, targets)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(mx.value_and_grad(loss, argnums=(0, 1))(head.trainable_parameters(), x))
        peaks.append(mx.get_peak_memory() - before)
    of_chunk = 4 * chunk * vocabulary
    # A matrix that is trained has a gradient, and a sum of those of two chunks.
    own = 8 * 4 * vocabulary * width * trained
    assert peaks[1] < MAX_LOGIT_CHUNKS * of_chunk + own
    assert peaks[1] < peaks[0] + 2 * of_chunk


@pytest.mark.parametrize(
    "vocabulary, on_a_cpu, elsewhere",
    [(512, 1024, 32768), (8192, 64, 2048), (256_000, 64, 65), (10**7, 16, 16)],
)
def test_chunks(vocabulary, on_a_cpu, elsewhere):
    for active, expected in ((Backend.CPU, on_a_cpu), (Backend.METAL, elsewhere)):
        with backend.use(active):
            assert loss.chunk_tokens(vocabulary) == expected


def test_a_frozen_head_has_no_gradient_of_its_size():
    """Nothing of (vocabulary, width) is in the graph of the gradients."""
    vocabulary, width = 1009, 512
    for kind in ("frozen", "quantized"):
        head = embedding(kind, vocabulary, width)
        x, targets = mx.zeros((5, width)), mx.zeros((5,), mx.int32)
        mx.eval(head.parameters(), x, targets)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(mx.grad(lambda x, h=head, t=targets: head_loss(x, t, h, 30.0))(x))
        assert mx.get_peak_memory() - before < 4 * vocabulary * width / 4


def test_packed_rows_are_the_sum_of_their_documents():
    model = golden_model("tiny-9b")
    batch, _ = golden_batch("packed")
    model.train()
    row = np.array(batch.segment_pos[1])
    starts = [*np.flatnonzero(row == 0), len(row)]
    total, gradients = 0.0, None

    def loss(model, batch):
        return batch_loss(model, batch)[0]

    for start, stop in pairwise(starts):
        part = [x[1:2, int(start) : int(stop)] for x in vars(batch).values()]
        value, own = nn.value_and_grad(model, loss)(model, Batch(*part))
        total += value.item()
        gradients = own if gradients is None else tree_map(mx.add, gradients, own)
    assert len(starts) > 3
    second = Batch(*(x[1:2] for x in vars(batch).values()))
    value, packed = nn.value_and_grad(model, loss)(model, second)
    assert value.item() == pytest.approx(total, rel=tolerance(2e-6))
    for (name, a), (_, b) in zip(tree_flatten(packed), tree_flatten(gradients), strict=True):
        scale = max(mx.linalg.norm(b).item(), 1e-4)
        assert mx.linalg.norm(a - b).item() / scale < tolerance(5e-5), name


def test_rows_of_one_document_need_no_positions():
    """Padding comes behind: with and without positions loss and gradients are the same."""
    model = golden_model("tiny-9b")
    batch, _ = golden_batch("plain")
    model.train()
    assert (batch.segment_pos == mx.arange(batch.shape[1])).all().item()
    length = batch.shape[1] - 5
    behind = mx.arange(batch.shape[1]) >= length
    padded = replace(
        batch,
        mask=batch.mask & ~behind,
        segment_pos=mx.where(behind, mx.arange(batch.shape[1]) - length, batch.segment_pos),
    )
    expected, gradients = gradients_of(model, padded)
    loss, found = gradients_of(model, replace(padded, segment_pos=None))
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance(1e-6))
    for name, wanted in gradients.items():
        scale = max(mx.linalg.norm(wanted).item(), 1e-4)
        assert mx.linalg.norm(found[name] - wanted).item() / scale < tolerance(1e-5), name


def test_targets_that_do_not_count():
    model = golden_model("tiny-9b")
    batch, _ = golden_batch("plain")
    none = Batch(batch.tokens, batch.targets, mx.zeros_like(batch.mask), batch.segment_pos)
    loss, count = batch_loss(model, none)
    assert (loss.item(), count.item()) == (0.0, 0)
    _, gradients = nn.value_and_grad(model, lambda m: batch_loss(m, none)[0])(model)
    assert all(not mx.any(g).item() for _, g in tree_flatten(gradients))


def test_checkpointed_dropout_is_the_same_going_back():
    """The gradient along a direction is the slope of the very loss that was computed."""
    mx.random.seed(3)
    model = golden_model("tiny-9b")
    add_dropout(model, 0.3)
    model.train()
    checkpoint_layers(model)
    batch, _ = golden_batch("plain")
    parameters = model.trainable_parameters()
    direction = tree_map(lambda p: 1e-4 * mx.random.normal(p.shape), parameters)

    def loss(parameters):
        mx.random.seed(7)
        model.update(parameters)
        return batch_loss(model, batch)[0]

    gradients = mx.grad(loss)(parameters)
    slope = sum(
        mx.sum(g * d).item()
        for (_, g), (_, d) in zip(tree_flatten(gradients), tree_flatten(direction), strict=True)
    )
    ahead = loss(tree_map(mx.add, parameters, direction)).item()
    behind = loss(tree_map(mx.subtract, parameters, direction)).item()
    assert (ahead - behind) / 2 == pytest.approx(slope, rel=0.02)
