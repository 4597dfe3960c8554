"""The kernels of the linear scan, executed from their Metal source, against float64."""

from __future__ import annotations

import float64
import mlx.core as mx
import numpy as np
import pytest
from executing import (
    FLOATS,
    FORWARD_RTOL,
    GRADIENT_RTOL,
    SCHEDULES,
    assert_close,
    executed,
    launched,
    needs_compiler,
)
from float64 import to64

from mlx_rgemma import ops

pytestmark = needs_compiler

# A simdgroup takes 8 steps and a tile 64, backward 4 and 32; a simdgroup has 32 channels.
SHAPES = [
    (1, 1, 1),
    (2, 1, 40),
    (1, 7, 32),
    (2, 32, 33),
    (3, 33, 5),
    (1, 64, 37),
    (2, 65, 31),
    (1, 300, 3),
]


def inputs(shape, dtype=mx.float32, a_dtype=None):
    batch, length, width = shape
    mx.random.seed(length)
    x = mx.random.normal(shape).astype(dtype)
    # Half of the coefficients close to 1: the state remembers across tiles.
    a = mx.sigmoid(mx.random.normal(shape) + 6.0 * (mx.arange(width) % 2)).astype(a_dtype or dtype)
    h0 = mx.random.normal((batch, width))
    reset = mx.random.uniform(shape=(batch, length)) < 0.03
    return x, a, h0, reset, mx.random.normal(shape).astype(dtype), mx.random.normal(h0.shape)


def run(x, a, h0, reset, dy, dh_last):
    """-> y, h_last and the gradients of sum(y dy) + sum(h_last dh_last)."""

    def outputs(x, a, h0):
        return ops.linear_scan(x, a, h0, reset)

    (y, h_last), (dx, da, dh0) = mx.vjp(outputs, [x, a, h0], [dy, dh_last])
    return {"y": y, "h_last": h_last, "dx": dx, "da": da, "dh0": dh0}


def exact(x, a, h0, reset, dy, dh_last):
    a64 = to64(a)
    if reset is not None:
        a64 = np.where(np.array(reset)[..., None], 0.0, a64)
    found = float64.scan(to64(x), a64, to64(h0), to64(dy), to64(dh_last))
    if reset is not None:
        found["da"] = np.where(np.array(reset)[..., None], 0.0, found["da"])
    return found


def check(arguments):
    expected = exact(*arguments)
    for name, value in run(*arguments).items():
        rtol = FORWARD_RTOL if name in ("y", "h_last") else GRADIENT_RTOL
        assert_close(name, value, expected[name], rtol)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape):
    with executed() as launches:
        check(inputs(shape))
    assert launched(launches) == ["linear_scan", "linear_scan_backward"]


@pytest.mark.parametrize("mode, order", SCHEDULES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes_and_thread_orders(dtype, mode, order):
    with executed(mode, order):
        check(inputs((2, 133, 37), FLOATS[dtype]))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_coefficients_may_keep_float32(dtype):
    with executed():
        arguments = inputs((2, 70, 9), FLOATS[dtype], mx.float32)
        check(arguments)
        assert run(*arguments)["da"].dtype == mx.float32


def test_without_reset_or_with_one_for_all_rows():
    x, a, h0, reset, dy, dh_last = inputs((2, 70, 9))
    with executed():
        check((x, a, h0, None, dy, dh_last))
        y, h_last = ops.linear_scan(x, a, h0, reset[:1])
    both = mx.broadcast_to(reset[:1], reset.shape)
    expected = exact(x, a, h0, both, dy, dh_last)
    assert_close("y", y, expected["y"], FORWARD_RTOL)
    assert_close("h_last", h_last, expected["h_last"], FORWARD_RTOL)


@pytest.mark.parametrize("flush", [False, True], ids=["denormals", "flushed"])
def test_coefficients_of_zero_one_and_almost_nothing(flush):
    shape = (2, 200, 8)
    x, _, h0, reset, dy, dh_last = inputs(shape)
    table = mx.array([0.0, 1.0, 1e-30, 1e-6, 1.0, 1e-38, 1.0, 1.0])
    a = table[mx.random.randint(0, 8, shape)]
    with executed(flush_denormals=flush):
        check((x, a, h0, reset, dy, dh_last))


def test_pieces_are_the_whole():
    x, a, h0, reset, _, _ = inputs((2, 154, 37))
    with executed():
        whole, last = ops.linear_scan(x, a, h0, reset)
        h, pieces, start = h0, [], 0
        for length in (1, 1, 7, 8, 9, 128):
            part = slice(start, start + length)
            y, h = ops.linear_scan(x[:, part], a[:, part], h, reset[:, part])
            pieces.append(y)
            start += length
    assert_close("y", mx.concatenate(pieces, axis=1), to64(whole), FORWARD_RTOL)
    assert_close("h_last", h, to64(last), FORWARD_RTOL)


def test_each_element_is_loaded_once_and_stored_once():
    shape = (1, 256, 64)
    x, a, h0, reset, dy, dh_last = inputs(shape)
    with executed("checked") as launches:
        run(x, a, h0, reset, dy, dh_last)
    forward, backward = (launch.traffic for launch in launches)
    for traffic, loaded, stored in (
        (forward, ("x", "a"), ("y",)),
        (backward, ("x", "a", "dy"), ("dx", "da")),
    ):
        for name in loaded:
            assert traffic[name].loads == traffic[name].elements_loaded == x.size, name
        for name in stored:
            assert traffic[name].stores == traffic[name].elements_stored == x.size, name
    assert forward["entry"].bytes_written == 4 * x.size / 32
    assert backward["entry"].loads == 8 * forward["entry"].stores  # once a simdgroup
