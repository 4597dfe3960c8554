"""The causal convolution: its reference and its emulated kernels, against float64."""

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
from helpers.float64 import to64
from helpers.golden_cases import arrays, cases
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_rgemma import ops
from mlx_rgemma.ops.causal_conv1d import BACKWARD, FORWARD

# A thread takes 16 tokens, a threadgroup 128; a simdgroup has 32 channels.
SHAPES = [(1, 1, 1), (2, 1, 40), (2, 2, 32), (1, 16, 5), (2, 17, 33), (3, 128, 3), (1, 131, 37)]
DIFFERENTIABLE = ("x", "weight", "bias", "state")
GRADIENTS = ("dx", "dweight", "dbias", "dstate")


def inputs(shape, dtype=mx.float32, *, taps=4, packed=False, lengths=None):
    batch, length, width = shape
    mx.random.seed(length)

    def normal(*shape):
        return mx.random.normal(shape).astype(dtype)

    # Documents of 1 to 9 tokens; the first one began before the chunk in every other row.
    starts = np.random.default_rng(length).random((batch, length)) < 0.3
    pos = np.zeros((batch, length), np.int64)
    for b in range(batch):
        for t in range(length):
            before = pos[b, t - 1] if t > 0 else 6 * (b % 2) - 1
            pos[b, t] = 0 if starts[b, t] or before >= 9 else before + 1
    return {
        "x": normal(*shape),
        "weight": normal(width, taps, 1),
        "bias": normal(width),
        "state": normal(batch, taps - 1, width),
        "segment_pos": mx.array(pos) if packed else None,
        "lengths": None if lengths is None else mx.array(lengths),
        "dy": normal(*shape),
        "d_new_state": normal(batch, taps - 1, width),
    }


def run(case):
    """Return y, new_state and the gradients of sum(y dy) + sum(new_state d_new_state)."""
    names = [name for name in DIFFERENTIABLE if case[name] is not None]

    def outputs(*values):
        now = {**case, **dict(zip(names, values, strict=True))}
        return ops.causal_conv1d(
            *(now["x"], now["weight"], now["bias"], now["state"]),
            segment_pos=now["segment_pos"],
            lengths=now["lengths"],
        )

    cotangents = [case["dy"], case["d_new_state"]]
    (y, new_state), found = mx.vjp(outputs, [case[name] for name in names], cotangents)
    gradients = {GRADIENTS[DIFFERENTIABLE.index(n)]: g for n, g in zip(names, found, strict=True)}
    return {"y": y, "new_state": new_state, **gradients}


def exact(case):
    batch, length, width = case["x"].shape
    pos, lengths = case["segment_pos"], case["lengths"]
    arrays = {k: to64(v) for k, v in case.items() if k in ("x", "weight", "dy", "d_new_state")}
    taps = case["weight"].shape[1]
    bias, state = case["bias"], case["state"]
    return float64.conv(
        **arrays,
        bias=np.zeros(width) if bias is None else to64(bias),
        state=np.zeros((batch, taps - 1, width)) if state is None else to64(state),
        segment_pos=np.full((batch, length), 99)
        if pos is None
        else np.broadcast_to(np.array(pos), (batch, length)),
        lengths=np.full(batch, length) if lengths is None else np.array(lengths),
    )


def check(case):
    expected = exact(case)
    for name, value in run(case).items():
        rtol = FORWARD_RTOL if name in ("y", "new_state") else GRADIENT_RTOL
        assert_close(name, value, expected[name], rtol)


@needs_compiler
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
def test_shapes(shape, packed):
    with emulated() as launches:
        check(inputs(shape, packed=packed))
    assert launched(launches) == ["causal_conv1d", "causal_conv1d_backward"]


@needs_compiler
@pytest.mark.parametrize("mode, order", SCHEDULES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes_and_thread_orders(dtype, mode, order):
    lengths = [140, 0, 1, 2, 3, 4, 129, 128]
    with emulated(mode, order):
        check(inputs((8, 140, 37), FLOATS[dtype], packed=True, lengths=lengths))


@needs_compiler
def test_lengths_without_documents():
    with emulated():
        check(inputs((8, 20, 5), lengths=[20, 0, 1, 2, 3, 4, 19, 16]))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("length", [1, 2, 40])
def test_documents_shared_by_all_rows(length, implementation):
    case = inputs((3, length, 5), packed=True)
    case["segment_pos"] = case["segment_pos"][1:2]
    with run_by(implementation, "causal_conv1d"):
        check(case)


@needs_compiler
@pytest.mark.parametrize("left_out", ["bias", "state"])
def test_optional_arguments(left_out):
    case = inputs((2, 20, 5))
    case[left_out] = None
    with emulated() as launches:
        check(case)
    assert len(launches) == 2


@needs_compiler
@pytest.mark.parametrize("taps", [2, 3, 5])
def test_other_numbers_of_taps(taps):
    with emulated("checked"):
        check(inputs((2, 20, 5), taps=taps, packed=True, lengths=[20, 3]))


@needs_compiler
def test_one_tap_uses_the_reference():
    with emulated() as launches:
        check(inputs((2, 20, 5), taps=1, packed=True))
    assert not launches


@needs_compiler
def test_chunks_give_the_whole_sequence():
    case = inputs((2, 154, 37), packed=True)
    with emulated():
        whole = run(case)
        state, pieces, start = case["state"], [], 0
        for length in (1, 2, 3, 16, 4, 128):
            part = slice(start, start + length)
            y, state = ops.causal_conv1d(
                *(case["x"][:, part], case["weight"], case["bias"], state),
                segment_pos=case["segment_pos"][:, part],
            )
            pieces.append(y)
            start += length
    assert mx.array_equal(mx.concatenate(pieces, axis=1), whole["y"])
    assert mx.array_equal(state, whole["new_state"])


@needs_compiler
def test_each_element_is_stored_once_and_few_are_loaded_twice():
    shape = (1, 256, 64)
    with emulated("checked") as launches:
        run(inputs(shape, mx.bfloat16))
    size, window = 256 * 64, (16 + 3) / 16
    for traffic, loaded, stored in (
        (launches[0].traffic, ("x",), ("y",)),
        (launches[1].traffic, ("x", "dy"), ("dx",)),
    ):
        for name in loaded:
            assert traffic[name].elements_loaded == size, name
            assert traffic[name].loads <= window * size, name
        for name in stored:
            assert traffic[name].stores == traffic[name].elements_stored == size, name
    # Partial gradients of the parameters: 5 numbers per 128 tokens.
    assert launches[1].traffic["d_parameters"].stores == 5 * size / 128


# Golden data and properties.

RTOL = tolerance(2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", cases("conv1d"))
def test_golden(name, implementation):
    """Against Google's code, in one call and token by token."""
    case = cases("conv1d")[name]
    x, weight_hf, bias, state = arrays(case, "x", "weight_hf", "bias", "state")
    positions = mx.array(case["segment_pos"])
    weight = weight_hf.swapaxes(1, 2)
    with run_by(implementation, "causal_conv1d"):
        y, new_state = ops.causal_conv1d(x, weight, bias, state, segment_pos=positions)
        tokens, state_so_far = [], state
        for t in range(x.shape[1]):
            one = slice(t, t + 1)
            token, state_so_far = ops.causal_conv1d(
                x[:, one], weight, bias, state_so_far, segment_pos=positions[:, one]
            )
            tokens.append(token)
    for found, last in ((y, new_state), (mx.concatenate(tokens, axis=1), state_so_far)):
        assert relative_error(found, case["y"]) < RTOL
        assert relative_error(last, case["new_state"]) < RTOL


def normal(rng: np.random.Generator, *shape: int) -> mx.array:
    return mx.array(rng.standard_normal(shape, dtype=np.float32))


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
    x, weight = normal(rng, batch, length, width), normal(rng, width, 4, 1)
    state = normal(rng, batch, 3, width)
    with run_by(implementation):
        y, new_state = ops.causal_conv1d(x, weight, None, state, lengths=mx.array(row_lengths))
        for row, n in enumerate(row_lengths):
            one = slice(row, row + 1)
            if n == 0:
                assert mx.array_equal(new_state[one], state[one])
                continue
            alone, state_alone = ops.causal_conv1d(x[one, :n], weight, None, state[one])
            assert relative_error(y[one, :n], np.array(alone)) < RTOL
            assert mx.array_equal(new_state[one], state_alone)


@needs_compiler
@pytest.mark.parametrize("kernel", [FORWARD, BACKWARD], ids=lambda kernel: kernel.name)
def test_validation(kernel):
    with emulated(validate=True):
        for variant in kernel.variants:
            assert kernel.validated(*variant), kernel.validation


def test_shapes_that_do_not_agree_are_named():
    x, weight = mx.zeros((2, 7, 5)), mx.zeros((5, 4, 1))
    with pytest.raises(ValueError, match=r"\[causal_conv1d\] weight has shape \(4, 4, 1\)"):
        ops.causal_conv1d(x, weight[1:])
    with pytest.raises(ValueError, match=r"\[causal_conv1d\] state has shape \(2, 4, 5\)"):
        ops.causal_conv1d(x, weight, state=mx.zeros((2, 4, 5)))
