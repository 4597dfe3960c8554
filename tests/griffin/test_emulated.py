"""The whole model with all its Metal kernels emulated on the CPU, against Google's code.

The emulator runs the source that MLX hands to Apple's compiler: see metal_emulator.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from helpers.assertions import LOGITS_ATOL, max_error
from helpers.emulated import emulated, launched, needs_compiler
from helpers.models import GOLDEN, golden, golden_model
from mlx.utils import tree_flatten
from test_golden import masked_loss, run_chunks

from mlx_rgemma.ops import backend, metal
from mlx_rgemma.ops.backend import Backend

pytestmark = [needs_compiler, pytest.mark.kernels]

INFERENCE = {"rms_norm", "add_rms_norm", "recurrent_decode", "decode_attention"}
PREFILL = {"rms_norm", "add_rms_norm", "causal_conv1d", "rg_lru", "rotary", "prefill_attention"}


def names(launches) -> set[str]:
    return set(launched(launches))


@pytest.fixture
def launches():
    """Emulate every kernel, each after its validation; one that is switched off is an error."""
    with emulated(validate=True) as record:
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
    with emulated("checked", "random"):
        logits = run_chunks(model, tokens, (12, 1, 1))
    assert max_error(logits, data["google_full"][:, :14]) < LOGITS_ATOL


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("recurrent_decode.metal", "kept + input", "kept"),
        ("recurrent_decode.metal", "float state =", "flaot state ="),
    ],
    ids=["wrong", "does-not-compile"],
)
def test_a_kernel_that_fails_is_switched_off_and_named(file, old, new, monkeypatch):
    """The model's results stay right: the reference takes the kernel's place."""
    source = metal.source
    assert old in source(file)
    monkeypatch.setattr(
        metal, "source", lambda f: source(f).replace(old, new) if f == file else source(f)
    )
    model = golden_model("tiny-sharded").eval()
    data = golden("decode/tiny-sharded.npz")
    with (
        emulated(validate=True),
        pytest.warns(RuntimeWarning, match=rf"{file} .* switched off") as warnings,
    ):
        logits = run_chunks(model, mx.array(data["tokens"]), (10, 1))
    assert max_error(logits, data["google_full"]) < LOGITS_ATOL
    assert len(warnings) == 1


def test_emulation_ends_with_its_context():
    """Afterwards MLX's own function is back, and so is the backend."""
    before, active = mx.fast.metal_kernel, backend.active()
    with emulated():
        assert mx.fast.metal_kernel is not before
        assert backend.active() is Backend.METAL
    assert mx.fast.metal_kernel is before
    assert backend.active() is active
