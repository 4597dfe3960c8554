"""The RG-LRU: its reference and its emulated kernels, against float64 and Google's code."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from helpers import float64
from helpers.assertions import relative_error, tolerance
from helpers.emulated import (
    FLOATS,
    FORWARD_RTOL,
    GRADIENT_RTOL,
    IMPLEMENTATIONS,
    SCHEDULES,
    assert_close,
    emulated,
    launched,
    needs_compiler,
    run_by,
)
from helpers.float64 import PADDING, RESET, to64
from helpers.golden_cases import arrays, cases
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_rgemma import ops
from mlx_rgemma.ops.rg_lru import BACKWARD, FORWARD

# A simdgroup takes 8 steps and a tile 64, backward 4 and 32; a simdgroup has 32 channels.
SHAPES = [
    (1, 1, 1),
    (3, 1, 40),
    (1, 5, 32),
    (2, 31, 33),
    (2, 33, 5),
    (1, 64, 31),
    (2, 66, 37),
    (1, 300, 3),
]
DIFFERENTIABLE = ("x", "input_gate", "recurrent_gate", "a_param", "h0", "bias_i", "bias_r")
GRADIENTS = ("dx", "d_input_gate", "d_recurrent_gate", "d_a_param", "dh0", "d_bias_i", "d_bias_r")


def inputs(shape, dtype=mx.float32, gate_dtype=None, *, lengths=None):
    """Return inputs with documents that start here and there, rows padded from `lengths` on."""
    batch, length, width = shape
    mx.random.seed(length)
    gate_dtype = gate_dtype or dtype

    def normal(*shape, dtype=dtype):
        return mx.random.normal(shape).astype(dtype)

    mask = None if lengths is None else mx.arange(length) < mx.array(lengths)[:, None]
    return {
        "x": normal(*shape),
        "input_gate": normal(*shape, dtype=gate_dtype),
        "recurrent_gate": normal(*shape, dtype=gate_dtype),
        # From a memory of thousands of tokens to one of a few tokens.
        "a_param": (mx.arange(width) % 16 - 11.0).astype(dtype),
        "h0": normal(batch, width, dtype=mx.float32),
        "reset": mx.random.uniform(shape=(batch, length)) < 0.03,
        "mask": mask,
        "bias_i": normal(width),
        "bias_r": normal(width),
        "dy": normal(*shape),
        "dh_last": normal(batch, width, dtype=mx.float32),
    }


def run(case):
    """Return y, h_last and the gradients of sum(y dy) + sum(h_last dh_last)."""
    names = [name for name in DIFFERENTIABLE if case[name] is not None]

    def outputs(*values):
        now = {**case, **dict(zip(names, values, strict=True))}
        return ops.rg_lru(
            *(now["x"], now["input_gate"], now["recurrent_gate"], now["a_param"]),
            now["h0"],
            now["reset"],
            now["mask"],
            input_gate_bias=now["bias_i"],
            recurrent_gate_bias=now["bias_r"],
        )

    cotangents = [case["dy"], case["dh_last"]]
    (y, h_last), found = mx.vjp(outputs, [case[name] for name in names], cotangents)
    gradients = {GRADIENTS[DIFFERENTIABLE.index(n)]: g for n, g in zip(names, found, strict=True)}
    return {"y": y, "h_last": h_last, **gradients}


def exact(case):
    steps = case["x"].shape[:2]
    types = np.zeros(steps, np.uint8)
    if case["reset"] is not None:
        types[np.broadcast_to(np.array(case["reset"]), steps)] = RESET
    if case["mask"] is not None:
        types[~np.broadcast_to(np.array(case["mask"]), steps)] = PADDING
    none = np.zeros(case["x"].shape[2])
    arrays = {k: none if v is None else to64(v) for k, v in case.items()}
    del arrays["reset"], arrays["mask"]
    return float64.rg_lru(token_type=types, **arrays)


def check(case):
    expected = exact(case)
    found = run(case)
    for name, value in found.items():
        rtol = FORWARD_RTOL if name in ("y", "h_last") else GRADIENT_RTOL
        assert_close(name, value, expected[name], rtol)
    return found


@needs_compiler
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape):
    with emulated() as launches:
        check(inputs(shape))
    assert launched(launches) == ["rg_lru", "rg_lru_backward"]


@needs_compiler
@pytest.mark.parametrize("mode, order", SCHEDULES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes_and_thread_orders(dtype, mode, order):
    with emulated(mode, order):
        check(inputs((2, 133, 37), FLOATS[dtype], lengths=[133, 120]))


@needs_compiler
def test_gates_may_keep_float32():
    with emulated() as launches:
        found = check(inputs((2, 70, 9), mx.bfloat16, mx.float32))
    assert found["d_recurrent_gate"].dtype == mx.float32
    assert found["dx"].dtype == mx.bfloat16
    assert len(launches) == 2


@needs_compiler
def test_gates_of_different_dtypes_use_the_reference():
    case = inputs((2, 20, 9))
    case["input_gate"] = case["input_gate"].astype(mx.bfloat16)
    with emulated() as launches:
        check(case)
    assert not launches


@needs_compiler
@pytest.mark.parametrize("biases", [(), ("bias_i",), ("bias_r",)], ids=["none", "i", "r"])
def test_biases_are_optional(biases):
    case = inputs((2, 20, 9))
    case.update({name: None for name in ("bias_i", "bias_r") if name not in biases})
    with emulated() as launches:
        check(case)
    assert len(launches) == 2


@needs_compiler
@pytest.mark.parametrize("shape", [(1, 1, 40), (2, 1, 40), (2, 70, 9)], ids=str)
@pytest.mark.parametrize("resets", ["none", "shared", "all"])
def test_resets(shape, resets):
    case = inputs(shape)
    batch, length, _ = shape
    case["reset"] = {
        "none": None,
        "shared": mx.arange(length)[None] % 64 == 0,
        "all": mx.ones((batch, length), mx.bool_),
    }[resets]
    with emulated():
        check(case)


@needs_compiler
def test_padding_changes_nothing_whatever_its_values():
    case = inputs((3, 70, 9), lengths=[70, 0, 65])
    with emulated():
        clean = check(case)
        padding = ~case["mask"][..., None]
        for name in ("x", "input_gate", "recurrent_gate"):
            case[name] = mx.where(padding, float("nan"), case[name])
        dirty = run(case)
    for name in clean:
        assert mx.array_equal(clean[name], dirty[name]), name


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_saturated_gates(implementation):
    """Coefficients of exactly 0 and 1, where the derivative of the square root is bounded."""
    case = inputs((2, 140, 12))
    case["a_param"] = mx.array([-40.0, -30.0, -10.0, 0.0, 10.0, 40.0] * 2)
    for seed, name in enumerate(("input_gate", "recurrent_gate")):
        signs = mx.sign(mx.random.normal(case[name].shape, key=mx.random.key(seed)))
        case[name] = mx.where(mx.arange(12) < 6, case[name], 60.0 * signs)
    case["bias_i"] = case["bias_r"] = None
    with run_by(implementation, "rg_lru"):
        check(case)


@needs_compiler
def test_chunks_give_the_whole_sequence():
    case = inputs((2, 154, 37))
    with emulated():
        whole = run(case)
        h, pieces, start = case["h0"], [], 0
        for length in (1, 1, 7, 8, 9, 128):
            part = {k: v[:, start : start + length] for k, v in case.items() if _per_step(v)}
            found = run({**case, **part, "h0": h})
            h = found["h_last"]
            pieces.append(found["y"])
            start += length
    assert_close("y", mx.concatenate(pieces, axis=1), to64(whole["y"]), FORWARD_RTOL)
    assert_close("h_last", h, to64(whole["h_last"]), FORWARD_RTOL)


def _per_step(value) -> bool:
    return value is not None and value.shape[:2] == (2, 154)


@needs_compiler
def test_gradients_are_the_same_in_any_order_of_threads():
    case = inputs((2, 133, 37), mx.bfloat16)
    found = []
    for order in ("forward", "reverse", "random"):
        with emulated(order=order, seed=3):
            found.append(run(case))
    for other in found[1:]:
        for name, value in found[0].items():
            assert mx.array_equal(value, other[name]), name


@needs_compiler
def test_each_element_is_loaded_once_and_stored_once():
    case = inputs((1, 256, 64), mx.bfloat16)
    with emulated("checked") as launches:
        run(case)
    forward, backward = (launch.traffic for launch in launches)
    read = ("x", "input_gate", "recurrent_gate")
    for traffic, loaded, stored in (
        (forward, read, ("y",)),
        (backward, (*read, "dy"), ("dx", "d_input_gate", "d_recurrent_gate")),
    ):
        for name in loaded:
            assert traffic[name].loads == traffic[name].elements_loaded == 256 * 64, name
        for name in stored:
            assert traffic[name].stores == traffic[name].elements_stored == 256 * 64, name
    # The states for the backward pass: 1/8 byte per element, beside 8.
    assert forward["chunk_states"].bytes_written == 256 * 64 / 8


@needs_compiler
def test_threadgroup_memory_fits():
    with emulated("checked") as launches:
        run(inputs((1, 130, 3)))
    assert all(launch.counters.threadgroup_bytes <= 8192 for launch in launches)


def test_shapes_that_do_not_agree_are_named():
    case = inputs((2, 7, 5))
    case["bias_r"] = mx.zeros((4,))
    with pytest.raises(ValueError, match=r"recurrent_gate_bias has shape \(4,\), expected \(5,\)"):
        run(case)


# Golden data and properties.

RTOL, GOLDEN_GRADIENT_RTOL = tolerance(5e-6), tolerance(2e-5)
GOLDEN_INPUTS = (
    "u",
    "input_gate_weight",
    "input_gate_bias",
    "recurrent_gate_weight",
    "recurrent_gate_bias",
    "recurrent_param",
    "h0",
)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", cases("rglru"))
def test_golden(name, implementation):
    """Against Google's code with its gates: values, and gradients of all inputs and parameters."""
    case = cases("rglru")[name]
    reset = mx.array(case["segment_pos"]) == 0
    gy, gh_last = arrays(case, "gy", "gh_last")

    def layer(u, iw, ib, rw, rb, a_param, h0):
        gates = (ops.block_diagonal(u, w) + b.reshape(-1) for w, b in ((iw, ib), (rw, rb)))
        return ops.rg_lru(u, *gates, a_param, h0, reset)

    def loss(*inputs):
        y, h_last = layer(*inputs)
        return (y * gy).sum() + (h_last * gh_last).sum()

    inputs = arrays(case, *GOLDEN_INPUTS)
    with run_by(implementation, "rg_lru"):
        y, h_last = layer(*inputs)
        gradients = mx.grad(loss, argnums=tuple(range(7)))(*inputs)
    assert relative_error(y, case["y"]) < RTOL
    assert relative_error(h_last, case["h_last"]) < RTOL
    for field, gradient in zip(GOLDEN_INPUTS, gradients, strict=True):
        assert mx.isfinite(gradient).all(), field
        assert relative_error(gradient, case[f"grad_{field}"]) < GOLDEN_GRADIENT_RTOL, field


def normal(rng: np.random.Generator, *shape: int) -> mx.array:
    return mx.array(rng.standard_normal(shape, dtype=np.float32))


@pytest.mark.parametrize("implementation", ["default", "reference"])
@settings(max_examples=40, deadline=None)
@given(length=st.integers(1, 300), cut=st.integers(1, 299), seed=st.integers(0, 2**31))
def test_a_sequence_may_be_cut_anywhere(implementation, length, cut, seed):
    rng = np.random.default_rng(seed)
    x, i, r = (normal(rng, 2, length, 5) for _ in range(3))
    a_param, h0 = normal(rng, 5), normal(rng, 2, 5)
    reset = mx.array(rng.random((2, length)) < 0.05)
    cut = min(cut, length)
    with run_by(implementation):
        whole, h_whole = ops.rg_lru(x, i, r, a_param, h0, reset)
        y, h = ops.rg_lru(x[:, :cut], i[:, :cut], r[:, :cut], a_param, h0, reset[:, :cut])
        parts = [y]
        if cut < length:
            y, h = ops.rg_lru(x[:, cut:], i[:, cut:], r[:, cut:], a_param, h, reset[:, cut:])
            parts.append(y)
    assert relative_error(mx.concatenate(parts, axis=1), np.array(whole)) < RTOL
    assert relative_error(h, np.array(h_whole)) < RTOL


@pytest.mark.parametrize("implementation", ["default", "reference"])
@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 60),
    row_lengths=st.lists(st.integers(0, 60), min_size=1, max_size=5),
    seed=st.integers(0, 2**31),
)
def test_a_padded_row_equals_the_row_alone(implementation, length, row_lengths, seed):
    rng = np.random.default_rng(seed)
    row_lengths = [min(n, length) for n in row_lengths]
    batch, width = len(row_lengths), 4
    x, i, r = (normal(rng, batch, length, width) for _ in range(3))
    a_param, h0 = normal(rng, width), normal(rng, batch, width)
    mask = mx.arange(length) < mx.array(row_lengths)[:, None]
    with run_by(implementation):
        y, h_last = ops.rg_lru(x, i, r, a_param, h0, mask=mask)
        for row, n in enumerate(row_lengths):
            one = slice(row, row + 1)
            if n == 0:
                assert mx.array_equal(h_last[one], h0[one])
                continue
            alone, h_alone = ops.rg_lru(x[one, :n], i[one, :n], r[one, :n], a_param, h0[one])
            assert relative_error(y[one, :n], np.array(alone)) < RTOL
            assert relative_error(h_last[one], np.array(h_alone)) < RTOL


@needs_compiler
@pytest.mark.parametrize("kernel", [FORWARD, BACKWARD], ids=lambda kernel: kernel.name)
def test_validation(kernel):
    with emulated(validate=True):
        for variant in kernel.variants:
            assert kernel.validated(*variant), kernel.validation
