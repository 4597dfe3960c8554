"""The whole model with all its kernels executed from their Metal source, against Google's code.

What runs is the text that MLX would hand to Apple's compiler, on the CPU: see metal_emulator.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import GOLDEN, LOGITS_ATOL, golden, golden_model, max_error
from metal_emulator import compiler, emulate
from mlx.utils import tree_flatten
from test_golden import masked_loss, run_chunks

from mlx_rgemma.ops import metal

_compiler, _reason = compiler()
pytestmark = pytest.mark.skipif(_compiler is None, reason=f"kernels not executed: {_reason}")

INFERENCE = {"rms_norm", "add_rms_norm", "recurrent_decode", "ring_attention"}
PREFILL = {"rms_norm", "add_rms_norm", "causal_conv1d", "rg_lru", "rotary", "windowed_attention"}


def names(launches) -> set[str]:
    return {launch.name.removeprefix("mlx_rgemma_") for launch in launches}


@pytest.fixture
def launches():
    """Every kernel runs from its source; a kernel that is switched off is an error."""
    record: list = []
    with emulate(record=record):
        yield record


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_full_pass(model_name, launches):
    model = golden_model(model_name).eval()
    data = golden(f"logits/{model_name}.npz")
    for key in data:
        if key.startswith("tokens_"):
            logits = model(mx.array(data[key]))
            expected = data[key.replace("tokens", "google")]
            assert max_error(logits, expected) < LOGITS_ATOL, key
    assert names(launches) >= PREFILL


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("sizes", [(20, 1), (9, 3, 1, 1, 12, 1, 30), (1, 1, 8, 2)], ids=str)
def test_chunks_and_steps(model_name, sizes, launches):
    model = golden_model(model_name).eval()
    data = golden(f"decode/{model_name}.npz")
    logits = run_chunks(model, mx.array(data["tokens"]), sizes)
    assert max_error(logits, data["google_full"]) < LOGITS_ATOL
    if sizes == (20, 1):
        assert names(launches) >= INFERENCE | PREFILL


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("step", [2, 100])
def test_ragged_batch(model_name, step, launches):
    from test_golden import test_ragged_batch as check

    check(model_name, step)
    assert names(launches) >= INFERENCE


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_packed_documents(launches):
    from test_golden import test_packed_documents as check

    check("tiny-2b")
    assert names(launches) >= PREFILL


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_greedy_tokens_are_identical(launches):
    from test_golden import test_greedy_tokens_are_identical as check

    check("tiny-9b")
    assert names(launches) >= INFERENCE


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("rows", ["plain", "packed"])
def test_training_step(rows, launches):
    model = golden_model("tiny-9b")
    data = golden(f"train/batch_{rows}.npz")
    expected = model.sanitize(mx.load(str(GOLDEN / f"train/grads_{rows}.safetensors")))
    loss, gradients = nn.value_and_grad(model, lambda m: masked_loss(m, data))(model)
    assert abs(loss.item() - float(data["loss"])) / float(data["loss"]) < 2e-6
    for name, gradient in tree_flatten(gradients):
        norm = mx.linalg.norm(expected[name]).item()
        assert mx.isfinite(gradient).all(), name
        if norm > 1e-7:
            error = mx.linalg.norm(gradient - expected[name]).item() / norm
            assert error < 2e-5, (name, error)
    assert names(launches) >= {"rg_lru_backward", "causal_conv1d_backward"}


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_bfloat16_budget(launches):
    from test_golden import test_bfloat16_budget as check

    check("base")
    check("longmem")


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_step_in_checked_mode():
    """No race, no stray access, nothing unwritten, in the kernels of a real decode step."""
    model = golden_model("tiny-sharded").eval()
    data = golden("decode/tiny-sharded.npz")
    tokens = mx.array(data["tokens"])[:, :14]
    with emulate(mode="checked", order="random"):
        logits = run_chunks(model, tokens, (12, 1, 1))
    assert max_error(logits, data["google_full"][:, :14]) < LOGITS_ATOL


@pytest.fixture
def fresh_verdicts():
    """No kernel has been tried yet, and none will have been."""
    metal.reset()
    yield
    metal.reset()


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("recurrent_decode.metal", "kept + input", "kept"),
        ("recurrent_decode.metal", "float state =", "flaot state ="),
    ],
    ids=["wrong", "does-not-compile"],
)
def test_a_kernel_that_goes_wrong_is_switched_off_and_named(
    file, old, new, monkeypatch, fresh_verdicts
):
    """The model stays right when a kernel does not: the plain form takes its place."""
    source = metal.source
    assert old in source(file)
    monkeypatch.setattr(
        kernels, "source", lambda f: source(f).replace(old, new) if f == file else source(f)
    )
    model = golden_model("tiny-sharded").eval()
    data = golden("decode/tiny-sharded.npz")
    with emulate(), pytest.warns(RuntimeWarning, match=rf"{file} .* switched off") as warnings:
        logits = run_chunks(model, mx.array(data["tokens"]), (10, 1))
    assert max_error(logits, data["google_full"]) < LOGITS_ATOL
    assert len(warnings) == 1


def test_nothing_is_left_behind():
    """Outside of `executed`, MLX's own function is back and kernels are off on this machine."""
    before = mx.fast.metal_kernel
    with emulate():
        assert mx.fast.metal_kernel is not before
    assert mx.fast.metal_kernel is before
    assert np.array_equal(np.array(mx.ones(2)), [1, 1])
