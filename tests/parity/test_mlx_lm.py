"""mlx-lm's own workflows with this package's class: load, generate, server, training."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.assertions import LOGITS_ATOL, max_error
from helpers.models import GOLDEN, golden, golden_model

from mlx_rgemma import Model, convert, generate, load, register
from mlx_rgemma.errors import ConfigError
from mlx_rgemma.io.hub import EMBEDDED


@pytest.fixture(autouse=True)
def registered():
    register()


def test_register_can_be_repeated():
    module = sys.modules["mlx_lm.models.recurrent_gemma"]
    register()
    assert sys.modules["mlx_lm.models.recurrent_gemma"] is module


def test_mlx_lm_loads_our_class():
    import mlx_lm.utils

    model, config = mlx_lm.utils.load_model(GOLDEN / "tiny-sharded")
    assert type(model) is Model
    assert config["model_type"] == "recurrent_gemma"
    model.set_dtype(mx.float32)
    data = golden("logits/tiny-sharded.npz")
    assert max_error(model(mx.array(data["tokens_L29"])), data["google_L29"]) < LOGITS_ATOL


MLX_LM_ARGUMENTS = {
    "model_type": "recurrent_gemma",
    "attention_bias": False,
    "conv1d_width": 3,
    "hidden_size": 128,
    "intermediate_size": 256,
    "logits_soft_cap": 1.0,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-4,
    "rope_theta": 1000,
    "attention_window_size": 1024,
    "vocab_size": 1000,
}
"""As mlx-lm's own test of its class (`test_models.test_recurrent_gemma`) gives them."""


@pytest.mark.parametrize("key", ["block_types", "_block_types"])
def test_model_args_as_mlx_lm_s_tests_make_them(key):
    """What mlx-lm asserts of each of its models, but for the dtype: logits are float32 here."""
    import copy

    from mlx_lm.models import recurrent_gemma
    from mlx_lm.models.cache import make_prompt_cache

    blocks = ["recurrent", "recurrent", "attention"]
    args = recurrent_gemma.ModelArgs(**MLX_LM_ARGUMENTS, **{key: blocks})
    assert (args.head_dim, args.lru_width, args.num_key_value_heads) == (32, 128, 1)
    assert args.block_types == tuple(blocks)
    model = recurrent_gemma.Model(args)
    assert len(model.layers) == args.num_hidden_layers and model.model_type == args.model_type
    for dtype in (mx.float32, mx.float16):
        model.set_dtype(dtype)
        tokens = mx.array([[0, 1]])
        assert model(tokens).shape == (1, 2, 1000)
        cache = make_prompt_cache(model)
        logits = model(tokens, cache=cache)
        assert logits.shape == (1, 2, 1000) and logits.dtype == mx.float32
        following = mx.argmax(logits[0, -1:, :], keepdims=True)
        assert model(following, cache=cache).shape == (1, 1, 1000)
    assert model(mx.array([[0, 1], [2, 3]])).shape == (2, 2, 1000)
    copied = copy.deepcopy(model)
    assert max_error(copied(tokens), np.array(model(tokens))) == 0


def test_model_args_of_this_package_s_own_names():
    from mlx_lm.models import recurrent_gemma

    more = {"lru_width": 64, "head_dim": 16, "eos_token_ids": (1, 107), "window": "hf"}
    args = recurrent_gemma.ModelArgs(**{**MLX_LM_ARGUMENTS, **more})
    assert args.block_types == ("recurrent", "recurrent", "attention")
    assert {key: getattr(args, key) for key in more} == more
    with pytest.raises(TypeError, match="unexpected keyword argument 'hidden'"):
        recurrent_gemma.ModelArgs(**MLX_LM_ARGUMENTS, hidden=3)
    with pytest.raises(ConfigError, match="vocab_size is missing"):
        recurrent_gemma.ModelArgs(**{**MLX_LM_ARGUMENTS, "vocab_size": None})


def test_mlx_lm_generates_with_our_class():
    import mlx_lm

    theirs = mlx_lm.load(str(EMBEDDED))
    assert type(theirs[0]) is Model
    theirs[0].set_dtype(mx.float32)
    model, tokenizer = load()
    prompt = "Once upon a time"
    expected = generate(model, tokenizer, prompt, max_tokens=20)
    assert mlx_lm.generate(*theirs, prompt, max_tokens=20) == expected


def test_gradient_checkpointing_changes_nothing():
    """mlx-lm's trainer replaces `__call__` of the class of the first layer."""
    from mlx_lm.tuner.trainer import grad_checkpoint

    tokens = mx.array(np.random.default_rng(0).integers(3, 90, (2, 40)))
    model = golden_model("tiny-9b", fuse=False)

    def loss(model):
        logits = model(tokens[:, :-1])
        return nn.losses.cross_entropy(logits, tokens[:, 1:], reduction="mean")

    layer = type(model.layers[0])
    plain_call = layer.__call__
    expected = nn.value_and_grad(model, loss)(model)
    try:
        grad_checkpoint(model.layers[0])
        assert layer.__call__ is not plain_call
        found = nn.value_and_grad(model, loss)(model)
    finally:
        layer.__call__ = plain_call
    assert abs(found[0].item() - expected[0].item()) < 1e-6
    from mlx.utils import tree_flatten

    for (name, a), (_, b) in zip(tree_flatten(found[1]), tree_flatten(expected[1]), strict=True):
        assert max_error(a, np.array(b)) < 1e-5, name


def test_bfloat16_training_steps_stay_finite():
    """mlx-lm's own class gives NaN on the first step."""
    import mlx.optimizers
    from mlx.utils import tree_flatten

    model = golden_model("tiny-9b", mx.bfloat16, fuse=False)  # has gates at exactly a = 1
    optimizer = mlx.optimizers.AdamW(1e-3)
    tokens = mx.array(np.random.default_rng(0).integers(3, 90, (4, 33)))
    step = nn.value_and_grad(
        model,
        lambda m: nn.losses.cross_entropy(m(tokens[:, :-1]), tokens[:, 1:], reduction="mean"),
    )
    losses = []
    for _ in range(12):
        loss, gradients = step(model)
        assert all(mx.isfinite(g).all() for _, g in tree_flatten(gradients))
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state, loss)
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1.0


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """mlx-lm's server with our class, on a free port.

    In float32: in bfloat16, rounding in a batch differs from rounding alone, and may turn a close
    decision between two words.
    """
    folder = tmp_path_factory.mktemp("server") / "float32"
    convert(str(EMBEDDED), str(folder), dtype="float32")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = "from mlx_rgemma import register; register(); from mlx_lm.server import main; main()"
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            code,
            "--model",
            str(folder),
            "--port",
            str(port),
            "--host",
            "127.0.0.1",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    url = f"http://127.0.0.1:{port}/v1"
    for _ in range(240):
        try:
            urllib.request.urlopen(f"{url}/models", timeout=2).read()
            break
        except OSError:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.25)
    yield url
    process.kill()
    process.wait()


def complete(url: str, prompt: str, max_tokens: int) -> str:
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.loads(response.read())["choices"][0]["text"]


def test_concurrent_unequal_prompts_through_the_server(server):
    """Each client gets what it would get alone. (With mlx-lm's own class, 7 of 18 do not.)"""
    stories = "Lily and Tom went to the park to play with a big red ball. " * 10
    prompts = [stories[: 11 * n] for n in (1, 2, 3, 7, 15, 30, 45, 50)]
    alone = [complete(server, prompt, 16) for prompt in prompts]
    assert len(set(alone)) > 4
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(lambda prompt: complete(server, prompt, 16), prompts))
    assert together == alone
