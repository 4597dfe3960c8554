"""Live parity with transformers on random weights (needs the extra `parity`)."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from helpers.assertions import LOGITS_ATOL, max_error

torch = pytest.importorskip("torch", reason="needs the extra: pip install '.[parity]'")
transformers = pytest.importorskip("transformers")

SHAPES = {
    "released cycle": {},
    "wide recurrence": {"lru_width": 96},
    "ends after attention": {"num_hidden_layers": 6},
    "small window": {"attention_window_size": 3},
    "other theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "attention bias": {"attention_bias": True},
    "no soft cap to speak of": {"logits_soft_cap": 1000.0},
}


@pytest.fixture(params=SHAPES, ids=lambda name: name.replace(" ", "-"))
def pair(request, tmp_path):
    """A random model as transformers runs it, and as this package loads it from its folder."""
    from mlx_rgemma import load_model

    torch.manual_seed(0)
    values = {
        "vocab_size": 90,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "attention_window_size": 16,
        "block_types": ("recurrent", "recurrent", "attention"),
        **SHAPES[request.param],
    }
    theirs = transformers.RecurrentGemmaForCausalLM(transformers.RecurrentGemmaConfig(**values))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            noise = torch.randn_like(parameter)
            if name.endswith("recurrent_param"):
                parameter.copy_(noise - 4.0)
            elif parameter.ndim == 1 or "gate_bias" in name:
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    theirs.eval().save_pretrained(tmp_path / "model")
    ours, _ = load_model(tmp_path / "model", dtype="float32", window="hf")
    return theirs, ours


def test_logits(pair):
    theirs, ours = pair
    for length in (1, 2, 15, 16, 17, 33, 70):
        tokens = np.random.default_rng(length).integers(3, 90, (2, length))
        with torch.no_grad():
            expected = theirs(torch.tensor(tokens), use_cache=False).logits.numpy()
        assert max_error(ours(mx.array(tokens)), expected) < LOGITS_ATOL, length


def test_greedy_decoding(pair):
    theirs, ours = pair
    prompt = np.random.default_rng(1).integers(3, 90, (1, 12))
    with torch.no_grad():
        expected = theirs.generate(
            torch.tensor(prompt), max_new_tokens=40, do_sample=False, eos_token_id=None
        )[0, 12:].tolist()
    cache = ours.make_cache()
    token = ours(mx.array(prompt), cache=cache)[:, -1:].argmax(axis=-1)
    generated = [token.item()]
    for _ in range(39):
        token = ours(token, cache=cache)[:, -1:].argmax(axis=-1)
        generated.append(token.item())
    assert generated == expected


def test_gradients(pair):
    theirs, ours = pair
    import mlx.nn as nn
    from mlx.utils import tree_flatten

    tokens = np.random.default_rng(2).integers(3, 90, (2, 14))
    targets = np.roll(tokens, -1, axis=1)
    loss = torch.nn.functional.cross_entropy(
        theirs(torch.tensor(tokens), use_cache=False).logits.flatten(0, 1),
        torch.tensor(targets).flatten(),
    )
    loss.backward()

    def our_loss(model):
        logits = model(mx.array(tokens))
        return nn.losses.cross_entropy(logits, mx.array(targets), reduction="mean")

    value, gradients = nn.value_and_grad(ours, our_loss)(ours)
    assert abs(value.item() - loss.item()) < 1e-5
    found = dict(tree_flatten(gradients))
    for name, parameter in theirs.named_parameters():
        if name == "lm_head.weight":
            continue
        expected = parameter.grad.numpy()
        if name.endswith("conv_1d.weight"):
            expected = expected.swapaxes(1, 2)
        scale = np.linalg.norm(expected)
        if scale > 1e-7:
            error = np.linalg.norm(np.array(found[name]) - expected) / scale
            assert error < 5e-5, (name, error)
