"""The recurrent block's decode step: reference and emulated kernel, against float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from helpers.assertions import relative_error, tolerance
from helpers.emulated import (
    FORWARD_RTOL,
    GRADIENT_RTOL,
    IMPLEMENTATIONS,
    assert_close,
    emulated,
    launched,
    needs_compiler,
    run_by,
)
from helpers.float64 import NORMAL, PADDING, RESET
from helpers.graphs import primitives
from helpers.models import golden
from helpers.recurrent_decode_cases import WEIGHTS, Case
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_rgemma import ops
from mlx_rgemma.ops import backend, metal
from mlx_rgemma.ops.backend import Backend
from mlx_rgemma.ops.recurrent_decode import KERNEL

RESULTS = ("out", "conv_state", "h")


def run(case: Case, **how):
    with emulated(**how) as launches:
        results = ops.recurrent_decode(*case.arrays)
        mx.eval(results)
    assert launched(launches) == ["recurrent_decode"]
    return results, launches[0]


def assert_step(case: Case, **how) -> None:
    assert_results(case, run(case, **how)[0])


def assert_results(case: Case, results) -> None:
    expected = case.expected()
    assert [x.dtype for x in results] == [case.dtype, case.dtype, mx.float32]
    for name, value in zip(RESULTS, results, strict=True):
        assert_close(name, value, expected[name], FORWARD_RTOL)
    assert np.array_equal(np.array(results[1].astype(mx.float32)), expected["conv_state"])


@needs_compiler
@pytest.mark.parametrize(
    ("dtype", "block"),
    [
        *(pytest.param(mx.float32, n, id=f"fp32-{n}") for n in (1, 6, 8, 16, 24, 40, 64, 128, 256)),
        *(pytest.param(mx.bfloat16, n, id=f"bf16-{n}") for n in (16, 40, 256)),
        *(pytest.param(mx.float16, n, id=f"fp16-{n}") for n in (16, 256)),
    ],
)
def test_blocks(dtype, block):
    assert_step(Case(heads=3, block=block, dtype=dtype))


@needs_compiler
@pytest.mark.parametrize("weight_dtype", [mx.float32, mx.bfloat16], ids=str)
def test_weights_of_another_dtype(weight_dtype):
    assert_step(Case(block=40, dtype=mx.float16, weight_dtype=weight_dtype))


@needs_compiler
@pytest.mark.parametrize("taps", [2, 3, 8])
def test_taps(taps):
    assert_step(Case(taps=taps, steps=2))


@needs_compiler
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("steps", range(1, 9))
def test_steps_and_rows(steps, batch):
    # Row 0 continues a document, row 1 starts documents, row 2 ends early.
    token_type = np.full((batch, steps), NORMAL)
    if batch > 1:
        token_type[1, [0, steps // 2]] = RESET
    if batch > 2:
        token_type[2, steps // 2 :] = PADDING
    assert_step(Case(batch, steps, token_type=token_type.tolist()))


@needs_compiler
@pytest.mark.parametrize("batch", [7, 8, 9, 17])
def test_batches_larger_than_a_threadgroup(batch):
    assert_step(Case(batch))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_call(implementation, data):
    batch, steps = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 8))
    rows = []
    for _ in range(data.draw(st.sampled_from([1, batch]))):
        row = data.draw(st.lists(st.sampled_from([NORMAL, RESET]), min_size=steps, max_size=steps))
        real = data.draw(st.integers(0, steps))
        rows.append(row[:real] + [PADDING] * (steps - real))
    case = Case(batch, steps, token_type=rows, seed=batch * steps)
    with run_by(implementation, "recurrent_decode"):
        results = ops.recurrent_decode(*case.arrays)
    assert_results(case, results)


@needs_compiler
def test_types_from_resets_and_mask():
    """The kernel reads the types as `token_types` returns them: None, bool or uint8."""
    reset, mask = mx.array([[False, True, False]]), mx.array([[True, True, False]])
    for token_type, same in (
        (ops.token_types(None, None), None),
        (ops.token_types(reset, None), [[NORMAL, RESET, NORMAL]]),
        (ops.token_types(reset, mask), [[NORMAL, RESET, PADDING]]),
    ):
        case = Case(2, 3, token_type=same)
        with emulated():
            results = ops.recurrent_decode(*case.arrays[:-1], token_type)
        for name, value in zip(RESULTS, results, strict=True):
            assert_close(name, value, case.expected()[name], FORWARD_RTOL)


@needs_compiler
@pytest.mark.parametrize("size", [1e4, 1e-4, 0.0])
def test_extreme_gates(size):
    case = Case(2, 3, token_type=[[NORMAL, RESET, NORMAL]])
    case.weights = case.weights._replace(
        input_weight=case.weights.input_weight * size,
        recurrent_weight=case.weights.recurrent_weight * size,
        # a = 1 exactly, a = 0 exactly, and both ends of the softplus.
        a_param=mx.array([-40.0, 100.0, -10.0, 10.0] * 8),
    )
    case.y_branch = case.y_branch * 20.0
    assert_step(case)


@needs_compiler
def test_one_call_or_many():
    token_type = [[NORMAL, NORMAL, RESET, NORMAL, NORMAL, RESET, RESET, NORMAL]]
    whole = Case(3, 8, token_type=token_type)
    y, x, weights, conv, h, token_type = whole.arrays
    expected, outputs = whole.expected(), []
    with emulated():
        for part in (slice(0, 1), slice(1, 4), slice(4, 5), slice(5, 8)):
            out, conv, h = ops.recurrent_decode(
                y[:, part], x[:, part], weights, conv, h, token_type[:, part]
            )
            outputs.append(out)
    assert_close("out", mx.concatenate(outputs, axis=1), expected["out"], FORWARD_RTOL)
    assert_close("h", h, expected["h"], FORWARD_RTOL)
    assert_close("conv_state", conv, expected["conv_state"], 0.0)


GOLDEN = golden("ops/rglru.npz")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", sorted({key.split("/")[0] for key in GOLDEN}))
def test_golden(name, implementation):
    case = {key.split("/")[1]: mx.array(v) for key, v in GOLDEN.items() if key.startswith(name)}
    u, h = case["u"], case["h0"]
    batch, length, width = u.shape
    weights = ops.RecurrentWeights(
        mx.broadcast_to(mx.array([0.0, 1.0])[:, None], (width, 2, 1)),  # passes its input on
        mx.zeros((width,)),
        *(
            case[f"{gate}_gate_{part}"]
            for gate in ("input", "recurrent")
            for part in ("weight", "bias")
        ),
        case["recurrent_param"],
    )
    conv, states = mx.zeros((batch, 1, width)), []
    token_type = ops.token_types(case["segment_pos"] == 0, None)
    with run_by(implementation, "recurrent_decode"):
        for first in range(0, length, ops.MAX_STEPS):
            part = slice(first, first + ops.MAX_STEPS)
            y = mx.full(u[:, part].shape, 32.0)  # gelu(32) = 32
            out, conv, h = ops.recurrent_decode(
                y, u[:, part], weights, conv, h, token_type[:, part]
            )
            states.append(out / 32.0)
    got = mx.concatenate(states, axis=1)
    assert relative_error(got, GOLDEN[f"{name}/y"]) < tolerance(FORWARD_RTOL)
    assert relative_error(h, GOLDEN[f"{name}/h_last"]) < tolerance(FORWARD_RTOL)


# Order of threads, memory traffic, launches, gradients, dispatch.

CHECKED = [
    pytest.param(Case(3, 2, token_type=[[1, 0], [0, 0], [0, 2]]), id="fp32"),
    pytest.param(Case(9), id="batch"),
    pytest.param(Case(1, 3, block=40, dtype=mx.bfloat16), id="bf16-odd-block"),
    pytest.param(Case(1, 1, block=256, dtype=mx.bfloat16), id="bf16-wide"),
    pytest.param(Case(1, 8, block=256, dtype=mx.float16), id="fp16-wide"),
]


@needs_compiler
@pytest.mark.parametrize("case", CHECKED)
def test_checked_in_every_order(case):
    expected, _ = run(case)
    for order in ("forward", "reverse", "random"):
        got, _ = run(case, mode="checked", order=order)
        assert all(mx.array_equal(a, b) for a, b in zip(got, expected, strict=True)), order


@needs_compiler
@pytest.mark.parametrize(("batch", "steps"), [(1, 1), (1, 8), (8, 1), (2, 3)], ids=str)
def test_each_weight_is_read_once(batch, steps):
    case = Case(batch, steps, block=128, dtype=mx.bfloat16)
    _, launch = run(case, mode="checked")
    for name in ("input_weight", "recurrent_weight"):
        traffic = launch.traffic[name]
        assert traffic.loads == traffic.elements_loaded == case.weights.input_weight.size
    for name in launch.outputs:
        traffic = launch.traffic[name.name]
        assert traffic.stores == traffic.elements_stored


@needs_compiler
def test_fits_threadgroup_memory():
    for dtype in metal.FLOATS:
        _, launch = run(Case(1, 8, heads=1, block=256, dtype=dtype))
        assert launch.counters.threadgroup_bytes <= 32768


def test_is_one_launch():
    case = Case(block=256, heads=1, dtype=mx.bfloat16)
    *arrays, weights, conv, h0, _ = case.arrays

    def step(y, x, conv, h0, *weights):
        return ops.recurrent_decode(y, x, ops.RecurrentWeights(*weights), conv, h0)

    mx.eval(case.arrays[:-1])
    assert primitives(step, *arrays, conv, h0, *weights, views=True) == ["CustomKernel"]


@needs_compiler
def test_gradients_are_those_of_the_reference():
    case = Case(2, 3, token_type=[[1, 0, 0], [0, 0, 0]])
    y, x, weights, conv, h0, token_type = case.arrays
    arrays = (y, x, conv, h0, *weights)

    def loss(y, x, conv, h0, *weights):
        results = ops.recurrent_decode(y, x, ops.RecurrentWeights(*weights), conv, h0, token_type)
        return sum(mx.square(r).sum() for r in results)

    gradient = mx.grad(loss, argnums=tuple(range(len(arrays))))
    with emulated() as launches:
        got = gradient(*arrays)
        mx.eval(got)
    assert "recurrent_decode" in launched(launches)
    with backend.use(Backend.MLX):
        expected = gradient(*arrays)
    for name, one, other in zip(("y", "x", "conv", "h0", *WEIGHTS), got, expected, strict=True):
        assert np.abs(np.array(other)).max() > 0, name
        assert relative_error(one, np.array(other)) < GRADIENT_RTOL, name


@needs_compiler
@pytest.mark.parametrize("rows", [1, 2, 4, 8])
def test_validation(rows):
    with emulated(validate=True):
        for dtype in metal.FLOATS:
            assert KERNEL.validated(dtype, dtype, 16, rows), KERNEL.validation


@needs_compiler
@pytest.mark.parametrize(
    "case", [Case(1, 9), Case(1, 1, taps=1), Case(1, 1, heads=1, block=260)], ids=str
)
def test_unsupported_arguments_use_the_reference(case):
    with emulated() as launches:
        results = ops.recurrent_decode(*case.arrays)
    assert "recurrent_decode" not in launched(launches)
    for name, value in zip(RESULTS, results, strict=True):
        assert_close(name, value, case.expected()[name], FORWARD_RTOL)


def test_wrong_shapes_are_named():
    y, x, weights, conv, h0, _ = Case(2, 3).arrays
    with pytest.raises(ValueError, match=r"y_branch has shape \(2, 2, 32\)"):
        ops.recurrent_decode(y[:, 1:], x, weights, conv, h0)
    with pytest.raises(ValueError, match=r"token_type has shape \(3, 3\)"):
        ops.recurrent_decode(y, x, weights, conv, h0, mx.zeros((3, 3), mx.uint8))
    with pytest.raises(ValueError, match="input_bias has shape"):
        ops.recurrent_decode(y, x, weights._replace(input_bias=h0), conv, h0)
