"""The model against Google's and Hugging Face's code, along every way of getting there."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.assertions import LOGITS_ATOL, max_error, tolerance
from helpers.models import golden, golden_model
from mlx.utils import tree_flatten

RULES = {"google": "google", "hf": "hf"}


def run_chunks(model, tokens: mx.array, sizes, cache=None) -> np.ndarray:
    """Logits of all tokens, fed in chunks of the given sizes (the last size repeats)."""
    cache = model.make_cache(tokens.shape[0]) if cache is None else cache
    outputs, at, sizes = [], 0, list(sizes)
    while at < tokens.shape[1]:
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        outputs.append(np.array(model(tokens[:, at : at + size], cache=cache)))
        at += size
    return np.concatenate(outputs, axis=1)


@pytest.mark.parametrize("rule", RULES)
def test_full_pass(model_name, rule):
    model = golden_model(model_name, window=rule)
    data = golden(f"logits/{model_name}.npz")
    lengths = sorted(int(k.removeprefix("tokens_L")) for k in data if k.startswith("tokens"))
    assert len(lengths) >= 5
    for length in lengths:
        logits = model(mx.array(data[f"tokens_L{length}"]))
        assert max_error(logits, data[f"{rule}_L{length}"]) < LOGITS_ATOL, length


def test_window_rules_differ_from_position_w_on(model_name):
    data = golden(f"decode/{model_name}.npz")
    google, hf = (golden_model(model_name, window=rule) for rule in RULES)
    tokens, window = mx.array(data["tokens"]), google.args.attention_window_size
    difference = np.abs(np.array(google(tokens)) - np.array(hf(tokens))).max(axis=(0, 2))
    assert difference[:window].max() < LOGITS_ATOL
    assert difference[window] > 0.1


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "sizes", [(1,), (2,), (3,), (7,), (16,), (17,), (5, 1, 1, 9, 1, 30), (1, 1, 13, 2, 50)], ids=str
)
def test_any_chunking(model_name, rule, sizes):
    model = golden_model(model_name, window=rule)
    data = golden(f"decode/{model_name}.npz")
    logits = run_chunks(model, mx.array(data["tokens"]), sizes)
    assert max_error(logits, data[f"{rule}_full"]) < LOGITS_ATOL


def test_random_chunkings(model_name):
    model = golden_model(model_name)
    data = golden(f"decode/{model_name}.npz")
    rng = np.random.default_rng(7)
    for _ in range(15):
        sizes = rng.choice([1, 1, 1, 2, 3, 4, 6, 9, 15, 18, 31], size=60).tolist()
        logits = run_chunks(model, mx.array(data["tokens"]), sizes)
        assert max_error(logits, data["google_full"]) < LOGITS_ATOL, sizes


def test_decode_after_prefill(model_name):
    model = golden_model(model_name)
    data = golden(f"decode/{model_name}.npz")
    prompts = sorted({int(k[1:].split("_")[0]) for k in data if k.startswith("P")})
    tokens = mx.array(data["tokens"])
    for prompt in prompts:
        cache = model.make_cache(2)
        model(tokens[:, :prompt], cache=cache)
        check_state(model, cache, data, prompt)
        logits = run_chunks(model, tokens[:, prompt:], [1], cache)
        assert max_error(logits, data[f"P{prompt}_google_decode"]) < LOGITS_ATOL


def check_state(model, cache, data, prompt):
    """The caches hold what Google's do: states, convolution inputs, and the last W keys."""
    window = model.args.attention_window_size
    for i, layer in enumerate(cache):
        name = f"P{prompt}_layer{i}"
        if hasattr(layer, "h"):
            assert max_error(layer.h, data[f"{name}_rg_lru_state"]) < LOGITS_ATOL
            assert max_error(layer.conv, data[f"{name}_conv1d_state"]) < LOGITS_ATOL
        else:
            ordered = np.array(layer.ring.in_order())  # oldest first, the newest last
            for back in range(1, min(window, prompt) + 1):
                slot = (prompt - back) % window
                assert max_error(ordered[:, 0, -back], data[f"{name}_ring_keys"][:, slot, 0]) < 1e-4
                assert (
                    max_error(ordered[:, 1, -back], data[f"{name}_ring_values"][:, slot, 0]) < 1e-4
                )


@pytest.mark.parametrize("step", [1, 2, 3, 5, 100])
def test_ragged_batch(model_name, step):
    """Right-padded prompts of 1, 2, 3 and more tokens, then continued together."""
    model = golden_model(model_name)
    data = golden(f"ragged/{model_name}.npz")
    lengths = data["lengths"].tolist()
    rows, longest = data["tokens_left_padded"].shape
    tokens = np.zeros((rows, longest), np.int32)
    for row, n in enumerate(lengths):
        tokens[row, :n] = data["tokens_left_padded"][row, longest - n :]

    cache = model.make_cache(rows)
    for layer in cache:
        layer.prepare(lengths=lengths, right_padding=[longest - n for n in lengths])
    logits = run_chunks(model, mx.array(tokens), [step], cache)
    for layer in cache:
        layer.finalize()
    last = np.stack([logits[row, n - 1] for row, n in enumerate(lengths)])
    assert max_error(last, data["last_prompt_logits"]) < LOGITS_ATOL

    continued = run_chunks(model, mx.array(data["continuation_tokens"]), [1], cache)
    assert max_error(continued, data["continuation_logits"]) < LOGITS_ATOL


def test_greedy_tokens_are_identical(model_name):
    model = golden_model(model_name)
    data = golden(f"greedy/{model_name}.npz")
    cache = model.make_cache(3)
    token = mx.argmax(model(mx.array(data["prompts"]), cache=cache)[:, -1], axis=-1)
    generated = [token]
    for _ in range(data["generated"].shape[1] - 1):
        token = mx.argmax(model(token[:, None], cache=cache)[:, -1], axis=-1)
        generated.append(token)
    assert np.array_equal(np.array(mx.stack(generated, axis=1)), data["generated"])


@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        ("no_embedding_scale", {"embeddings_scale_by_sqrt_dim": False}),
        ("no_soft_cap", {"logits_soft_cap": 0}),
        ("soft_cap_5", {"logits_soft_cap": 5.0}),
        ("window_4", {"attention_window_size": 4}),
        ("first_2_layers_no_attention", {"num_hidden_layers": 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_variants(variant, changes):
    data = golden("variants.npz")
    model = golden_model("tiny-9b", **changes)
    tokens = mx.array(data["tokens"])
    # Without a cap, logits reach 100 and more: the tolerance is relative there.
    scale = max(1.0, float(np.abs(data[variant]).max()) / 30.0)
    assert max_error(model(tokens), data[variant]) < LOGITS_ATOL * scale
    assert max_error(run_chunks(model, tokens, [6, 1, 1, 20]), data[variant]) < LOGITS_ATOL * scale


def masked_loss(model, data) -> mx.array:
    logits = model(mx.array(data["tokens"]), segment_pos=mx.array(data["segment_pos"]))
    mask = mx.array(data["loss_mask"])
    loss = nn.losses.cross_entropy(logits, mx.array(data["targets"]))
    return (loss * mask).sum() / mask.sum()


@pytest.mark.parametrize("rows", ["plain", "packed"])
def test_loss_and_gradients(rows):
    model = golden_model("tiny-9b")
    data = golden(f"train/batch_{rows}.npz")
    from helpers.models import GOLDEN

    expected = model.sanitize(mx.load(str(GOLDEN / f"train/grads_{rows}.safetensors")))
    loss, gradients = nn.value_and_grad(model, lambda m: masked_loss(m, data))(model)
    gradients = dict(tree_flatten(gradients))
    assert abs(loss.item() - float(data["loss"])) / float(data["loss"]) < tolerance(2e-6)
    assert set(gradients) == set(expected)
    for name, gradient in expected.items():
        assert mx.isfinite(gradients[name]).all(), name
        norm = mx.linalg.norm(gradient).item()
        if norm > 1e-7:
            error = mx.linalg.norm(gradients[name] - gradient).item() / norm
            assert error < tolerance(2e-5), (name, error)


def test_packed_documents(model_name):
    """Documents packed in a row give what each gives alone, in one pass and in chunks."""
    model = golden_model(model_name)
    window = model.args.attention_window_size
    rng = np.random.default_rng(3)
    documents = [rng.integers(3, 90, n) for n in (1, 2, 3, window, window + 2, 2 * window + 1, 1)]
    tokens = mx.array(np.concatenate(documents)[None])
    positions = mx.array(np.concatenate([np.arange(len(d)) for d in documents])[None])
    alone = np.concatenate([np.array(model(mx.array(d[None]))) for d in documents], axis=1)

    assert max_error(model(tokens, segment_pos=positions), alone) < LOGITS_ATOL
    for size in (1, 2, 5, window, 3 * window):
        cache, outputs = model.make_cache(), []
        for at in range(0, tokens.shape[1], size):
            part = slice(at, at + size)
            outputs.append(
                np.array(model(tokens[:, part], cache=cache, segment_pos=positions[:, part]))
            )
        assert max_error(np.concatenate(outputs, axis=1), alone) < LOGITS_ATOL, size


def test_packed_golden_logits():
    data = golden("train/batch_plain.npz")
    model = golden_model("tiny-9b")
    logits = model(mx.array(data["tokens"]), segment_pos=mx.array(data["segment_pos"]))
    assert max_error(logits, data["logits_google"]) < LOGITS_ATOL


@pytest.mark.parametrize("far", [1_001, 1_000_003, 10_000_001, 2**33 + 5])
def test_positions_are_exact_anywhere(model_name, far):
    """The same tokens at position 1 and ten million later give the same logits."""
    model = golden_model(model_name)
    tokens = mx.array(np.random.default_rng(5).integers(3, 90, (2, 40)))
    near_positions = mx.arange(1, 41, dtype=mx.int64)[None] + mx.zeros((2, 1), mx.int64)
    near = model(tokens, segment_pos=near_positions)
    distant = model(tokens, segment_pos=near_positions + mx.array(far - 1, mx.int64))
    assert max_error(distant, np.array(near)) < LOGITS_ATOL


@pytest.mark.parametrize("reference", ["base", "longmem"])
def test_bfloat16_budget(reference):
    """Mean KL against float32. Google's code: 1.4e-3 and 5.7e-2; gates, scan and norms in
    float32 make 7e-4 possible on both."""
    data = golden("bf16/reference_logits.npz")
    model = golden_model("tiny-2b", mx.bfloat16)
    if reference == "longmem":
        from helpers.models import GOLDEN

        overlay = mx.load(str(GOLDEN / "bf16/longmem_overlay.safetensors"))
        model.load_weights(list(overlay.items()), strict=False)
    tokens = mx.array(data["tokens"])
    expected = mx.array(data[f"google_fp32_{reference}"])
    for logits in (model(tokens), mx.array(run_chunks(model, tokens, [40, 1, 1, 1, 60]))):
        p = expected - mx.logsumexp(expected, axis=-1, keepdims=True)
        q = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        assert (mx.exp(p) * (p - q)).sum(axis=-1).mean().item() < 1.2e-3
