"""The decode step of the recurrent block, emulated from its Metal source, against float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from conftest import golden, relative_error
from helpers.emulated import (
    FORWARD_RTOL,
    GRADIENT_RTOL,
    assert_close,
    launched,
    needs_compiler,
)
from helpers.float64 import NORMAL, PADDING, RESET
from helpers.recurrent_decode_cases import WEIGHTS, Case
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_rgemma import ops
from mlx_rgemma.ops import metal
from mlx_rgemma.ops.autograd import inference_mode
from mlx_rgemma.ops.recurrent_decode import STEP

pytestmark = needs_compiler

RESULTS = ("out", "conv_state", "h")


def run(case: Case, **how):
    with emulated(**how) as launches:
        results = ops.recurrent_decode(*case.arrays)
        mx.eval(results)
    assert launched(launches) == ["recurrent_decode"]
    return results, launches[0]


def assert_step(case: Case, **how) -> None:
    results, _ = run(case, **how)
    expected = case.expected()
    assert [x.dtype for x in results] == [case.dtype, case.dtype, mx.float32]
    for name, value in zip(RESULTS, results, strict=True):
        assert_close(name, value, expected[name], FORWARD_RTOL)
    assert np.array_equal(np.array(results[1].astype(mx.float32)), expected["conv_state"])


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


@pytest.mark.parametrize("weight_dtype", [mx.float32, mx.bfloat16], ids=str)
def test_weights_of_another_dtype(weight_dtype):
    assert_step(Case(block=40, dtype=mx.float16, weight_dtype=weight_dtype))


@pytest.mark.parametrize("taps", [2, 3, 8])
def test_taps(taps):
    assert_step(Case(taps=taps, steps=2))


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("steps", range(1, 9))
def test_steps_and_rows(steps, batch):
    # Row 0 goes on, row 1 starts documents, row 2 ends early.
    kind = np.full((batch, steps), NORMAL)
    if batch > 1:
        kind[1, [0, steps // 2]] = RESET
    if batch > 2:
        kind[2, steps // 2 :] = PADDING
    assert_step(Case(batch, steps, kind=kind.tolist()))


@pytest.mark.parametrize("batch", [7, 8, 9, 17])
def test_batches_larger_than_a_threadgroup(batch):
    assert_step(Case(batch))


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_call(data):
    batch, steps = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 8))
    rows = []
    for _ in range(data.draw(st.sampled_from([1, batch]))):
        row = data.draw(st.lists(st.sampled_from([NORMAL, RESET]), min_size=steps, max_size=steps))
        real = data.draw(st.integers(0, steps))
        rows.append(row[:real] + [PADDING] * (steps - real))
    assert_step(Case(batch, steps, kind=rows, seed=batch * steps))


def test_kinds_as_the_scan_has_them():
    reset, mask = mx.array([[False, True, False]]), mx.array([[True, True, False]])
    for kind, same in (
        (ops.token_types(None, None), None),
        (ops.token_types(reset, None), [[NORMAL, RESET, NORMAL]]),
        (ops.token_types(reset, mask), [[NORMAL, RESET, PADDING]]),
    ):
        case = Case(2, 3, kind=same)
        with emulated():
            results = ops.recurrent_decode(*case.arrays[:-1], kind)
        for name, value in zip(RESULTS, results, strict=True):
            assert_close(name, value, case.expected()[name], FORWARD_RTOL)


@pytest.mark.parametrize("size", [1e4, 1e-4, 0.0])
def test_extreme_gates(size):
    case = Case(2, 3, kind=[[NORMAL, RESET, NORMAL]])
    case.weights = case.weights._replace(
        input_weight=case.weights.input_weight * size,
        recurrent_weight=case.weights.recurrent_weight * size,
        # a = 1 exactly, a = 0 exactly, and both ends of the softplus.
        a_param=mx.array([-40.0, 100.0, -10.0, 10.0] * 8),
    )
    case.y_branch = case.y_branch * 20.0
    assert_step(case)


def test_one_call_or_many():
    kind = [[NORMAL, NORMAL, RESET, NORMAL, NORMAL, RESET, RESET, NORMAL]]
    whole = Case(3, 8, kind=kind)
    y, x, weights, conv, h, kind = whole.arrays
    expected, outputs = whole.expected(), []
    with emulated():
        for part in (slice(0, 1), slice(1, 4), slice(4, 5), slice(5, 8)):
            out, conv, h = ops.recurrent_decode(
                y[:, part], x[:, part], weights, conv, h, kind[:, part]
            )
            outputs.append(out)
    assert_close("out", mx.concatenate(outputs, axis=1), expected["out"], FORWARD_RTOL)
    assert_close("h", h, expected["h"], FORWARD_RTOL)
    assert_close("conv_state", conv, expected["conv_state"], 0.0)


GOLDEN = golden("ops/rglru.npz")


@pytest.mark.parametrize("name", sorted({key.split("/")[0] for key in GOLDEN}))
def test_golden(name):
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
    kind = ops.token_types(case["segment_pos"] == 0, None)
    with emulated():
        for first in range(0, length, ops.MAX_STEPS):
            part = slice(first, first + ops.MAX_STEPS)
            y = mx.full(u[:, part].shape, 32.0)  # gelu(32) = 32
            out, conv, h = ops.recurrent_decode(y, u[:, part], weights, conv, h, kind[:, part])
            states.append(out / 32.0)
    got = mx.concatenate(states, axis=1)
    assert relative_error(got, GOLDEN[f"{name}/y"]) < FORWARD_RTOL
    assert relative_error(h, GOLDEN[f"{name}/h_last"]) < FORWARD_RTOL


# What surrounds the numbers.

CHECKED = [
    pytest.param(Case(3, 2, kind=[[1, 0], [0, 0], [0, 2]]), id="fp32"),
    pytest.param(Case(9), id="batch"),
    pytest.param(Case(1, 3, block=40, dtype=mx.bfloat16), id="bf16-odd-block"),
    pytest.param(Case(1, 1, block=256, dtype=mx.bfloat16), id="bf16-wide"),
    pytest.param(Case(1, 8, block=256, dtype=mx.float16), id="fp16-wide"),
]


@pytest.mark.parametrize("case", CHECKED)
def test_checked_in_every_order(case):
    expected, _ = run(case)
    for order in ("forward", "reverse", "random"):
        got, _ = run(case, mode="checked", order=order)
        assert all(mx.array_equal(a, b) for a, b in zip(got, expected, strict=True)), order


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


def test_fits_threadgroup_memory():
    for dtype in metal.FLOATS:
        _, launch = run(Case(1, 8, heads=1, block=256, dtype=dtype))
        assert launch.counters.threadgroup_bytes <= 32768


def test_is_one_launch(monkeypatch):
    case, names = Case(block=256, heads=1, dtype=mx.bfloat16), []
    monkeypatch.setenv(kernels.VARIABLE, "metal")
    *arrays, weights, conv, h0, _ = case.arrays

    def step(y, x, conv, h0, *weights):
        return ops.recurrent_decode(y, x, ops.RecurrentWeights(*weights), conv, h0)

    def note(call):
        if call["type"] == "primitive":
            names.append(call["name"])

    mx.eval(case.arrays[:-1])
    with inference_mode():
        mx.export_function(note, step, *arrays, conv, h0, *weights)
    assert names == ["CustomKernel"]


def test_gradients_are_those_of_the_plain_operations():
    case = Case(2, 3, kind=[[1, 0, 0], [0, 0, 0]])
    y, x, weights, conv, h0, kind = case.arrays
    arrays = (y, x, conv, h0, *weights)

    def loss(y, x, conv, h0, *weights):
        results = ops.recurrent_decode(y, x, ops.RecurrentWeights(*weights), conv, h0, kind)
        return sum(mx.square(r).sum() for r in results)

    gradient = mx.grad(loss, argnums=tuple(range(len(arrays))))
    with emulated() as launches:
        got = gradient(*arrays)
        mx.eval(got)
    assert "recurrent_decode" in launched(launches)
    with emulated(switch="off"):
        expected = gradient(*arrays)
    for name, one, other in zip(("y", "x", "conv", "h0", *WEIGHTS), got, expected, strict=True):
        assert np.abs(np.array(other)).max() > 0, name
        assert relative_error(one, np.array(other)) < GRADIENT_RTOL, name


@pytest.mark.parametrize("rows", [1, 2, 4, 8])
def test_trial(rows):
    with emulated(switch="auto"):
        metal.reset()
        for dtype in metal.FLOATS:
            assert STEP.usable(dtype, dtype, 16, rows), STEP.validation


@pytest.mark.parametrize(
    "case", [Case(1, 9), Case(1, 1, taps=1), Case(1, 1, heads=1, block=260)], ids=str
)
def test_what_the_kernel_does_not_take_goes_the_plain_way(case):
    with emulated() as launches:
        results = ops.recurrent_decode(*case.arrays)
    assert "recurrent_decode" not in launched(launches)
    for name, value in zip(RESULTS, results, strict=True):
        assert_close(name, value, case.expected()[name], FORWARD_RTOL)


def test_wrong_shapes_are_named():
    y, x, weights, conv, h0, _ = Case(2, 3).arrays
    with pytest.raises(ValueError, match=r"y_branch has shape \(2, 2, 32\)"):
        ops.recurrent_decode(y[:, 1:], x, weights, conv, h0)
    with pytest.raises(ValueError, match=r"kind has shape \(3, 3\)"):
        ops.recurrent_decode(y, x, weights, conv, h0, mx.zeros((3, 3), mx.uint8))
    with pytest.raises(ValueError, match="input_bias has shape"):
        ops.recurrent_decode(y, x, weights._replace(input_bias=h0), conv, h0)
