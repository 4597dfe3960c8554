"""Attention of a chunk: its reference and its emulated kernel, against float64."""

from __future__ import annotations

import importlib

import mlx.core as mx
import numpy as np
import pytest
from helpers.assertions import relative_error, tolerance
from helpers.attention_cases import (
    DTYPES_AND_HEAD_DIMS,
    PACKED,
    Case,
    assert_call,
    assert_rotated,
    attend,
    attend_rotated,
    counted,
    packed,
    windowed_attention,
)
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
from helpers.golden_cases import arrays, cases
from helpers.graphs import primitives
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_rgemma import ops
from mlx_rgemma.ops import backend, metal
from mlx_rgemma.ops.backend import Backend
from mlx_rgemma.ops.prefill_attention import KERNEL, tile

# The kernel: every head size and dtype.


@needs_compiler
@pytest.mark.parametrize(("dtype", "head_dim"), DTYPES_AND_HEAD_DIMS)
def test_dtypes_and_head_sizes(dtype, head_dim):
    assert_rotated(Case(3, head_dim, 12, PACKED, slots=13, write_pos=5, dtype=dtype))


# The kernel: lengths, heads, windows, rings and documents, on one compilation.


@needs_compiler
@pytest.mark.parametrize("heads", [1, 2, 5, 10, 16])
@pytest.mark.parametrize("length", [1, 3, 37, 70])
def test_rows_of_a_tile(length, heads):
    assert_rotated(Case(heads, 16, 24, counted(0, length), bounded=False))


@needs_compiler
@pytest.mark.parametrize("write_pos", range(8))
@pytest.mark.parametrize("length", [1, 12])
def test_any_write_position(length, write_pos):
    case = Case(2, 16, 7, counted(50, length), slots=8, write_pos=write_pos, bounded=False)
    assert_rotated(case)


@needs_compiler
@pytest.mark.parametrize("slots", [3, 7, 8, 20], ids=lambda n: f"{n}-slots")
@pytest.mark.parametrize("length", [1, 9])
def test_ring_smaller_and_larger_than_the_window(length, slots):
    case = Case(2, 16, 7, counted(50, length), slots=slots, write_pos=2, bounded=False)
    assert_rotated(case)
    assert_call(case)


@needs_compiler
@pytest.mark.parametrize("cached_len", [0, 1, 6, 12])
def test_slots_never_written_are_never_read(cached_len):
    # The token `cached_len` back is in slot write_pos - cached_len; older slots are not a number.
    case = Case(3, 16, 12, counted(cached_len, 30), slots=13, write_pos=4)
    expected = case.rotated().expected()
    unwritten = [(4 - d) % 13 for d in range(cached_len + 1, 14)]
    case.ring.kv[:, :, mx.array(unwritten)] = mx.nan
    assert_close("out", attend(case)[0], expected, FORWARD_RTOL)


@needs_compiler
def test_ragged_rows():
    positions = np.stack([counted(0, 20)[0], counted(40, 20)[0], packed(20, 3, 4, start=7)[0]])
    assert_rotated(Case(3, 16, 9, positions, batch=3, slots=10, write_pos=6))


@needs_compiler
def test_rows_share_positions():
    assert_call(Case(3, 16, 9, counted(4, 6), batch=3, slots=10, write_pos=6))


@needs_compiler
def test_a_query_that_sees_nothing_gives_zero():
    case = Case(2, 16, 5, counted(8, 3), slots=6)
    case.max_lookback = mx.array([[-1, 2, -1]])
    out, _ = attend_rotated(case)
    assert not mx.any(out[:, :, 0::2])
    assert mx.all(mx.isfinite(out))


@needs_compiler
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_call(data):
    draw = data.draw
    batch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 16))
    length, window = draw(st.integers(1, 40)), draw(st.integers(0, 50))
    slots = draw(st.sampled_from([0, window + 1, window + 4]))
    write_pos = draw(st.integers(0, max(0, slots - 1)))
    rows = []
    for _ in range(batch):
        borders = draw(st.lists(st.integers(0, length - 1), max_size=3))
        # Without a ring there is nothing before the chunk.
        start = draw(st.integers(0, 60)) if slots else 0
        rows.append(packed(length, *sorted(borders), start=start)[0])
    assert_call(Case(heads, 16, window, np.stack(rows), batch, slots, write_pos, seed=length))


@needs_compiler
def test_large_scores():
    case = Case(2, 16, 12, PACKED, slots=13, write_pos=5)
    case.q = case.q * 100.0
    assert_rotated(case)


# Golden data, chunks and steps, on every implementation.

GOLDEN = [
    (name, rule)
    for name, case in cases("attention").items()
    for rule in ("window_plus_1", "window")
    if f"out_keys_{rule}" in case
]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("name", "rule"), GOLDEN)
def test_golden(name, rule, implementation):
    """Against Google's code (window + 1 keys) and Hugging Face's (window keys)."""
    case = cases("attention")[name]
    window = int(case["window"]) - (rule == "window")
    q, k, v = (z.swapaxes(1, 2) for z in arrays(case, "q", "k", "v"))
    positions = mx.array(case.get("positions", case.get("segment_pos")))
    cos, sin = ops.rotary_angles(positions, ops.rotary_frequencies(q.shape[-1] // 2, 10000.0))
    lookback = mx.minimum(positions, window) if "segment_pos" in case else None
    with run_by(implementation, "prefill_attention"):
        out, _ = ops.prefill_attention(q, k, v, cos, sin, window=window, max_lookback=lookback)
    # In case `offset`, the float32 angles of the expected values at position 5,000 are the limit.
    allowed = tolerance(2e-4 if name == "offset" else 2e-6)
    assert relative_error(out.swapaxes(1, 2), case[f"out_keys_{rule}"]) < allowed


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("chunks", [(40,), (1,) * 40, (7, 1, 1, 20, 3, 8)], ids=str)
def test_chunks_and_steps_agree(chunks, implementation):
    window, slots = 9, 10
    whole = Case(3, 16, window, packed(40, 0, 17, 25, 27), batch=2)
    cos, sin = whole.angles()
    # The kernels never read a slot that is not written. The others multiply it by a weight of 0,
    # so there it must be a number.
    unwritten = mx.nan if implementation == "emulated" else 1e3
    kv, write_pos, first, outputs = mx.full((2, 2, slots, 16), unwritten), 0, 0, []
    with run_by(implementation, "prefill_attention"):
        for length in chunks:
            part = slice(first, first + length)
            out, new = ops.prefill_attention(
                *(x[:, :, part] for x in (whole.q, whole.k, whole.v, cos, sin)),
                window=window,
                max_lookback=whole.max_lookback[:, part],
                ring=ops.RingBuffer(kv, write_pos) if first else None,
            )
            outputs.append(out)
            for i in range(max(0, length - slots), length):
                kv[:, :, (write_pos + i) % slots] = new[:, :, i]
            write_pos, first = (write_pos + length) % slots, first + length
    expected = whole.rotated().expected()
    assert_close("out", mx.concatenate(outputs, axis=2), expected, FORWARD_RTOL)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("bounded", [False, True], ids=["full ring", "lookback"])
def test_the_last_query_alone(bounded, implementation):
    case = Case(3, 16, 12, counted(30, 20), slots=13, write_pos=5, bounded=bounded)
    with run_by(implementation):
        out, kv = ops.prefill_attention(
            *(case.q, case.k, case.v, *case.angles()),
            window=case.window,
            max_lookback=case.max_lookback,
            ring=case.ring,
            last_only=True,
        )
    turned = case.rotated()
    assert_close("out", out, turned.expected()[:, :, -1:], FORWARD_RTOL)
    assert mx.array_equal(kv, mx.concatenate([turned.k, turned.v], axis=1))


# The kernel: order of threads, memory traffic, memory, launches, gradients, dispatch.

CHECKED = [
    pytest.param(Case(3, 16, 12, PACKED, slots=13, write_pos=5), id="fp32"),
    pytest.param(Case(1, 20, 6, counted(9, 11), slots=7, write_pos=3), id="odd-head"),
    pytest.param(Case(3, 256, 12, PACKED, slots=13, dtype=mx.bfloat16), id="bf16"),
    pytest.param(Case(2, 256, 6, counted(0, 4), dtype=mx.float32), id="wide-fp32"),
]


@needs_compiler
@pytest.mark.parametrize("case", CHECKED)
def test_checked_in_every_order(case):
    out, kv, _ = attend(case)
    for order in ("forward", "reverse", "random"):
        got = attend(case, mode="checked", order=order)
        assert mx.array_equal(got[0], out), order
        assert mx.array_equal(got[1], kv), order


@needs_compiler
@pytest.mark.parametrize("head_dim", [16, 256])
def test_each_key_is_read_once_per_threadgroup(head_dim):
    window, length, heads = 20, 64, 2
    case = Case(heads, head_dim, window, counted(500, length), slots=32, write_pos=3, bounded=False)
    (launch,) = attend_rotated(case, mode="checked")[1]
    tokens = tile(head_dim, mx.float32)[0] // heads
    # A tile of queries needs the keys of its own tokens and a window before them, and the last of
    # them up to 7 times more: fragments have 8 rows.
    keys = -(-(window + tokens) // 8) * 8
    assert launch.traffic["kv"].loads <= 2 * head_dim * keys * length // tokens
    assert launch.traffic["kv"].most_loads <= -(-(window + tokens) // tokens) + 1 + 7
    # Of the ring's 32 slots, the 20 that the first queries see.
    assert launch.traffic["ring"].elements_loaded == 2 * window * head_dim
    assert launch.traffic["q"].loads == case.q.size
    assert launch.traffic["out"].stores == case.q.size


@needs_compiler
def test_memory_does_not_grow_with_the_length():
    used = []
    for length in (8, 200):
        (launch,) = attend_rotated(Case(2, 16, 6, counted(9, length), slots=7))[1]
        assert [x.shape for x in launch.outputs] == [(1, length, 2, 16)]
        used.append(launch.counters.threadgroup_bytes)
    assert used[0] == used[1] <= 32768
    for dtype in metal.FLOATS:  # and of the largest heads
        (launch,) = attend_rotated(Case(1, 256, 6, counted(0, 1), dtype=dtype))[1]
        assert launch.counters.threadgroup_bytes <= 32768


@needs_compiler
def test_one_compilation_for_all_lengths():
    texts = set()
    for length, window, heads in ((8, 5, 1), (33, 9, 3)):
        case = Case(heads, 16, window, counted(9, length), slots=window + 1)
        texts.add(attend(case)[2][-1].source)
    assert len(texts) == 1


@pytest.mark.parametrize(("length", "launches"), [(1, 1), (5, 2)], ids=["step", "chunk"])
def test_launches_of_a_layer(length, launches):
    kv = mx.zeros((1, 2, 8, 16))
    cos, sin = ops.rotary_angles(mx.arange(length)[None], ops.rotary_frequencies(8, 10000.0))

    def layer(q, k, v):
        # As the projections give them: tokens before heads.
        q = q.reshape(1, length, 3, 16).swapaxes(1, 2)
        out, _ = ops.prefill_attention(q, k, v, cos, sin, window=7, ring=ops.RingBuffer(kv, 3))
        return out.swapaxes(1, 2).reshape(1, length, 48)

    mx.eval(kv, cos, sin)
    inputs = [mx.zeros((1, length, 48)), *[mx.zeros((1, 1, length, 16))] * 2]
    assert primitives(layer, *inputs) == ["CustomKernel"] * launches


@needs_compiler
@pytest.mark.parametrize("length", [1, 14], ids=["step", "chunk"])
def test_gradients_are_those_of_the_reference(length):
    borders = () if length == 1 else (7,)
    case = Case(3, 16, 6, packed(length, *borders, start=4), slots=7, write_pos=2)
    inputs = (case.q, case.k, case.v, *case.angles(), case.ring.kv)
    weight = mx.random.normal(case.q.shape, key=mx.random.key(1))

    def loss(q, k, v, cos, sin, kv):
        out, new = ops.prefill_attention(
            *(q, k, v, cos, sin),
            window=case.window,
            max_lookback=case.max_lookback,
            ring=ops.RingBuffer(kv, case.write_pos),
        )
        return (out * weight).sum() + mx.square(new).sum()

    gradient = mx.value_and_grad(loss, argnums=tuple(range(6)))
    with emulated() as launches:
        value, got = gradient(*inputs)
        mx.eval(value, got)
    assert ("decode" if length == 1 else "prefill") + "_attention" in launched(launches)
    with backend.use(Backend.MLX):
        exact, expected = gradient(*inputs)
    assert abs(value.item() - exact.item()) < 1e-4 * abs(exact.item())
    for one, other in zip(got, expected, strict=True):
        assert np.abs(np.array(other)).max() > 0
        assert relative_error(one, np.array(other)) < GRADIENT_RTOL


def test_vmap_is_that_of_the_reference(monkeypatch):
    case = Case(3, 16, 6, counted(0, 9), batch=2, bounded=False)
    # The kernel is traced without values, as on a Mac.
    module = importlib.import_module("mlx_rgemma.ops.prefill_attention")
    calls = []
    monkeypatch.setattr(module, "_launch", lambda q, *_: (calls.append(1), [mx.zeros_like(q)])[1])

    def one(q, k, v):
        return windowed_attention(q[None], k[None], v[None], window=6)[0]

    with backend.use(Backend.METAL), metal.skip_validation():
        out = mx.vmap(one)(case.q, case.k, case.v)
    assert calls
    assert_close("out", out, case.expected(), FORWARD_RTOL)


@needs_compiler
def test_validation():
    with emulated(validate=True):
        for variant in KERNEL.variants:
            assert KERNEL.validated(*variant), KERNEL.validation


@needs_compiler
def test_unsupported_arguments_use_the_reference():
    case, narrow = Case(2, 16, 6, counted(0, 4)), Case(2, 4, 6, counted(0, 4))
    other_dtype = ops.RingBuffer(mx.zeros((1, 2, 7, 16), mx.bfloat16), 0)
    inputs = (case.q, case.k, case.v)
    lookback = case.max_lookback
    with emulated() as launches:
        out = windowed_attention(*inputs, window=6, max_lookback=lookback, ring=other_dtype)
        small = windowed_attention(narrow.q, narrow.k, narrow.v, window=6)
        assert not launches
        windowed_attention(*inputs, window=6)
        assert len(launches) == 1
    assert_close("out", out, case.expected(), FORWARD_RTOL)
    assert_close("out", small, narrow.expected(), FORWARD_RTOL)


def test_wrong_shapes_are_named():
    case = Case(2, 16, 6, counted(0, 4), slots=7)
    cos, sin = case.angles()

    def call(q=case.q, cos=cos, **options):
        ops.prefill_attention(q, case.k, case.v, cos, sin, window=6, **options)

    with pytest.raises(ValueError, match=r"\[prefill_attention\] q has shape"):
        call(q=case.q[:, :, 1:])
    with pytest.raises(ValueError, match=r"max_lookback has shape \(1, 3\)"):
        call(max_lookback=case.max_lookback[:, 1:])
    with pytest.raises(ValueError, match="write position 7"):
        call(ring=ops.RingBuffer(case.ring.kv, 7))
    with pytest.raises(ValueError, match="cos has shape"):
        call(cos=cos[:, :, 1:])
