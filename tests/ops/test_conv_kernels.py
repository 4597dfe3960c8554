"""The kernels of the causal convolution, emulated from their Metal source, against float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from helpers import float64
from helpers.emulated import (
    FLOATS,
    FORWARD_RTOL,
    GRADIENT_RTOL,
    SCHEDULES,
    assert_close,
    launched,
    needs_compiler,
)
from helpers.float64 import to64

from mlx_rgemma import ops

pytestmark = needs_compiler

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


def run(given):
    """-> y, new_state and the gradients of sum(y dy) + sum(new_state d_new_state)."""
    names = [name for name in DIFFERENTIABLE if given[name] is not None]

    def outputs(*values):
        now = {**given, **dict(zip(names, values, strict=True))}
        return ops.causal_conv1d(
            *(now["x"], now["weight"], now["bias"], now["state"]),
            segment_pos=now["segment_pos"],
            lengths=now["lengths"],
        )

    cotangents = [given["dy"], given["d_new_state"]]
    (y, new_state), found = mx.vjp(outputs, [given[name] for name in names], cotangents)
    gradients = {GRADIENTS[DIFFERENTIABLE.index(n)]: g for n, g in zip(names, found, strict=True)}
    return {"y": y, "new_state": new_state, **gradients}


def exact(given):
    batch, length, width = given["x"].shape
    pos, lengths = given["segment_pos"], given["lengths"]
    arrays = {k: to64(v) for k, v in given.items() if k in ("x", "weight", "dy", "d_new_state")}
    taps = given["weight"].shape[1]
    bias, state = given["bias"], given["state"]
    return float64.conv(
        **arrays,
        bias=np.zeros(width) if bias is None else to64(bias),
        state=np.zeros((batch, taps - 1, width)) if state is None else to64(state),
        segment_pos=np.full((batch, length), 99)
        if pos is None
        else np.broadcast_to(np.array(pos), (batch, length)),
        lengths=np.full(batch, length) if lengths is None else np.array(lengths),
    )


def check(given):
    expected = exact(given)
    for name, value in run(given).items():
        rtol = FORWARD_RTOL if name in ("y", "new_state") else GRADIENT_RTOL
        assert_close(name, value, expected[name], rtol)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
def test_shapes(shape, packed):
    with emulated() as launches:
        check(inputs(shape, packed=packed))
    assert launched(launches) == ["causal_conv1d", "causal_conv1d_backward"]


@pytest.mark.parametrize("mode, order", SCHEDULES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes_and_thread_orders(dtype, mode, order):
    lengths = [140, 0, 1, 2, 3, 4, 129, 128]
    with emulated(mode, order):
        check(inputs((8, 140, 37), FLOATS[dtype], packed=True, lengths=lengths))


def test_lengths_without_documents():
    with emulated():
        check(inputs((8, 20, 5), lengths=[20, 0, 1, 2, 3, 4, 19, 16]))


@pytest.mark.parametrize("length", [1, 2, 40])
def test_documents_shared_by_all_rows(length):
    given = inputs((3, length, 5), packed=True)
    given["segment_pos"] = given["segment_pos"][1:2]
    with emulated():
        check(given)
    with emulated(switch="off"):
        check(given)


@pytest.mark.parametrize("left_out", ["bias", "state"])
def test_optional_arguments(left_out):
    given = inputs((2, 20, 5))
    given[left_out] = None
    with emulated() as launches:
        check(given)
    assert len(launches) == 2


@pytest.mark.parametrize("taps", [2, 3, 5])
def test_other_numbers_of_taps(taps):
    with emulated("checked"):
        check(inputs((2, 20, 5), taps=taps, packed=True, lengths=[20, 3]))


def test_one_tap_takes_the_plain_path():
    with emulated() as launches:
        check(inputs((2, 20, 5), taps=1, packed=True))
    assert not launches


def test_pieces_are_the_whole():
    given = inputs((2, 154, 37), packed=True)
    with emulated():
        whole = run(given)
        state, pieces, start = given["state"], [], 0
        for length in (1, 2, 3, 16, 4, 128):
            part = slice(start, start + length)
            y, state = ops.causal_conv1d(
                *(given["x"][:, part], given["weight"], given["bias"], state),
                segment_pos=given["segment_pos"][:, part],
            )
            pieces.append(y)
            start += length
    assert mx.array_equal(mx.concatenate(pieces, axis=1), whole["y"])
    assert mx.array_equal(state, whole["new_state"])


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
    # Shares of the parameters' gradients: 5 numbers for each 128 tokens.
    assert launches[1].traffic["d_parameters"].stores == 5 * size / 128
