"""The kernels of the RG-LRU, emulated from their Metal source, against float64."""

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
from helpers.float64 import PADDING, RESET, to64

from mlx_rgemma import ops

pytestmark = needs_compiler

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
    """Documents that begin here and there; rows padded from `lengths` on."""
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
        # From a memory of thousands of tokens to one of a few.
        "a_param": (mx.arange(width) % 16 - 11.0).astype(dtype),
        "h0": normal(batch, width, dtype=mx.float32),
        "reset": mx.random.uniform(shape=(batch, length)) < 0.03,
        "mask": mask,
        "bias_i": normal(width),
        "bias_r": normal(width),
        "dy": normal(*shape),
        "dh_last": normal(batch, width, dtype=mx.float32),
    }


def run(given):
    """-> y, h_last and the gradients of sum(y dy) + sum(h_last dh_last)."""
    names = [name for name in DIFFERENTIABLE if given[name] is not None]

    def outputs(*values):
        now = {**given, **dict(zip(names, values, strict=True))}
        return ops.rg_lru(
            *(now["x"], now["input_gate"], now["recurrent_gate"], now["a_param"]),
            now["h0"],
            now["reset"],
            now["mask"],
            input_gate_bias=now["bias_i"],
            recurrent_gate_bias=now["bias_r"],
        )

    cotangents = [given["dy"], given["dh_last"]]
    (y, h_last), found = mx.vjp(outputs, [given[name] for name in names], cotangents)
    gradients = {GRADIENTS[DIFFERENTIABLE.index(n)]: g for n, g in zip(names, found, strict=True)}
    return {"y": y, "h_last": h_last, **gradients}


def exact(given):
    steps = given["x"].shape[:2]
    kind = np.zeros(steps, np.uint8)
    if given["reset"] is not None:
        kind[np.broadcast_to(np.array(given["reset"]), steps)] = RESET
    if given["mask"] is not None:
        kind[~np.broadcast_to(np.array(given["mask"]), steps)] = PADDING
    none = np.zeros(given["x"].shape[2])
    arrays = {k: none if v is None else to64(v) for k, v in given.items()}
    del arrays["reset"], arrays["mask"]
    return float64.rg_lru(kind=kind, **arrays)


def check(given):
    expected = exact(given)
    found = run(given)
    for name, value in found.items():
        rtol = FORWARD_RTOL if name in ("y", "h_last") else GRADIENT_RTOL
        assert_close(name, value, expected[name], rtol)
    return found


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape):
    with emulated() as launches:
        check(inputs(shape))
    assert launched(launches) == ["rg_lru", "rg_lru_backward"]


@pytest.mark.parametrize("mode, order", SCHEDULES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes_and_thread_orders(dtype, mode, order):
    with emulated(mode, order):
        check(inputs((2, 133, 37), FLOATS[dtype], lengths=[133, 120]))


def test_gates_may_keep_float32():
    with emulated() as launches:
        found = check(inputs((2, 70, 9), mx.bfloat16, mx.float32))
    assert found["d_recurrent_gate"].dtype == mx.float32
    assert found["dx"].dtype == mx.bfloat16
    assert len(launches) == 2


def test_gates_of_different_dtypes_take_the_plain_path():
    given = inputs((2, 20, 9))
    given["input_gate"] = given["input_gate"].astype(mx.bfloat16)
    with emulated() as launches:
        check(given)
    assert not launches


@pytest.mark.parametrize("biases", [(), ("bias_i",), ("bias_r",)], ids=["none", "i", "r"])
def test_biases_are_optional(biases):
    given = inputs((2, 20, 9))
    given.update({name: None for name in ("bias_i", "bias_r") if name not in biases})
    with emulated() as launches:
        check(given)
    assert len(launches) == 2


@pytest.mark.parametrize("shape", [(1, 1, 40), (2, 1, 40), (2, 70, 9)], ids=str)
@pytest.mark.parametrize("resets", ["none", "shared", "all"])
def test_resets(shape, resets):
    given = inputs(shape)
    batch, length, _ = shape
    given["reset"] = {
        "none": None,
        "shared": mx.arange(length)[None] % 64 == 0,
        "all": mx.ones((batch, length), mx.bool_),
    }[resets]
    with emulated():
        check(given)


def test_padding_changes_nothing_whatever_it_holds():
    given = inputs((3, 70, 9), lengths=[70, 0, 65])
    with emulated():
        clean = check(given)
        padding = ~given["mask"][..., None]
        for name in ("x", "input_gate", "recurrent_gate"):
            given[name] = mx.where(padding, float("nan"), given[name])
        dirty = run(given)
    for name in clean:
        assert mx.array_equal(clean[name], dirty[name]), name


@pytest.mark.parametrize("path", ["executed", "plain"])
def test_saturated_gates(path):
    """Coefficients that are 0 and 1 to the last bit, and the bounded derivative beside them."""
    given = inputs((2, 140, 12))
    given["a_param"] = mx.array([-40.0, -30.0, -10.0, 0.0, 10.0, 40.0] * 2)
    for seed, name in enumerate(("input_gate", "recurrent_gate")):
        signs = mx.sign(mx.random.normal(given[name].shape, key=mx.random.key(seed)))
        given[name] = mx.where(mx.arange(12) < 6, given[name], 60.0 * signs)
    given["bias_i"] = given["bias_r"] = None
    with emulated(switch="metal" if path == "executed" else "off"):
        check(given)


def test_pieces_are_the_whole():
    given = inputs((2, 154, 37))
    with emulated():
        whole = run(given)
        h, pieces, start = given["h0"], [], 0
        for length in (1, 1, 7, 8, 9, 128):
            part = {k: v[:, start : start + length] for k, v in given.items() if _per_step(v)}
            found = run({**given, **part, "h0": h})
            h = found["h_last"]
            pieces.append(found["y"])
            start += length
    assert_close("y", mx.concatenate(pieces, axis=1), to64(whole["y"]), FORWARD_RTOL)
    assert_close("h_last", h, to64(whole["h_last"]), FORWARD_RTOL)


def _per_step(value) -> bool:
    return value is not None and value.shape[:2] == (2, 154)


def test_gradients_are_the_same_in_any_order_of_threads():
    given = inputs((2, 133, 37), mx.bfloat16)
    found = []
    for order in ("forward", "reverse", "random"):
        with emulated(order=order, seed=3):
            found.append(run(given))
    for other in found[1:]:
        for name, value in found[0].items():
            assert mx.array_equal(value, other[name]), name


def test_each_element_is_loaded_once_and_stored_once():
    given = inputs((1, 256, 64), mx.bfloat16)
    with emulated("checked") as launches:
        run(given)
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
    # The states for the backward pass: 1/8 byte an element beside 8.
    assert forward["entry"].bytes_written == 256 * 64 / 8


def test_one_threadgroup_memory_fits():
    with emulated("checked") as launches:
        run(inputs((1, 130, 3)))
    assert all(launch.counters.threadgroup_bytes <= 8192 for launch in launches)


def test_shapes_that_do_not_agree_are_named():
    given = inputs((2, 7, 5))
    given["bias_r"] = mx.zeros((4,))
    with pytest.raises(ValueError, match=r"recurrent_gate_bias has shape \(4,\), expected \(5,\)"):
        run(given)
