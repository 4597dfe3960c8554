"""Attention of a decode step: its reference and its emulated kernel, against float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from helpers.assertions import relative_error, tolerance
from helpers.attention_cases import (
    DTYPES_AND_HEAD_DIMS,
    Case,
    assert_call,
    attend,
    counted,
    dense_attention,
    random,
)
from helpers.emulated import (
    FORWARD_RTOL,
    IMPLEMENTATIONS,
    assert_close,
    emulated,
    launched,
    needs_compiler,
    run_by,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_rgemma import ops
from mlx_rgemma.ops import metal
from mlx_rgemma.ops.decode_attention import KERNEL


@needs_compiler
@pytest.mark.parametrize(("dtype", "head_dim"), DTYPES_AND_HEAD_DIMS)
def test_dtypes_and_head_sizes(dtype, head_dim):
    assert_call(Case(3, head_dim, 150, counted(140, 1), slots=151, write_pos=7, dtype=dtype))


@needs_compiler
@pytest.mark.parametrize("write_pos", range(8))
def test_any_write_position(write_pos):
    assert_call(Case(2, 16, 7, counted(50, 1), slots=8, write_pos=write_pos, bounded=False))


@needs_compiler
@pytest.mark.parametrize("cached_len", [0, 1, 6, 12])
def test_slots_never_written_are_never_read(cached_len):
    # The token `cached_len` back is in slot write_pos - cached_len; older slots are not a number.
    case = Case(3, 16, 12, counted(cached_len, 1), slots=13, write_pos=4)
    expected = case.rotated().expected()
    unwritten = [(4 - d) % 13 for d in range(cached_len + 1, 14)]
    case.ring.kv[:, :, mx.array(unwritten)] = mx.nan
    assert_close("out", attend(case)[0], expected, FORWARD_RTOL)


@needs_compiler
def test_ragged_rows():
    assert_call(Case(3, 16, 9, np.array([[0], [40], [7]]), batch=3, slots=10, write_pos=6))


@needs_compiler
def test_rows_share_positions():
    assert_call(Case(3, 16, 9, counted(4, 1), batch=3, slots=10, write_pos=6))


@needs_compiler
def test_two_heads_share_their_reads_in_large_batches():
    case = Case(10, 16, 30, counted(99, 1), batch=8, slots=31, write_pos=11, bounded=False)
    assert_call(case)
    assert dict(attend(case)[2][0].template)["HEADS"] == 2


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("write_pos", [0, 4, 7])
def test_the_token_is_appended_to_the_ring(write_pos, implementation):
    """The new ring has the token in place of the oldest one; the given ring stays as it is."""
    case = Case(2, 16, 7, counted(50, 1), slots=8, write_pos=write_pos, bounded=False)
    before = mx.array(case.ring.kv)
    with run_by(implementation, "decode_attention"):
        out, ring = ops.decode_attention(
            case.q, case.k, case.v, *case.angles(), case.ring, window=7
        )
    turned = case.rotated()
    assert_close("out", out, turned.expected(), FORWARD_RTOL)
    assert ring.write_pos == (write_pos + 1) % 8
    expected = mx.array(before)
    expected[:, :, write_pos] = mx.concatenate([turned.k, turned.v], axis=1)[:, :, 0]
    assert mx.array_equal(ring.kv, expected)
    assert mx.array_equal(case.ring.kv, before)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=40, deadline=None)
@given(
    past=st.integers(0, 40),
    window=st.integers(1, 20),
    spare=st.sampled_from([0, 1, 4]),
    same_length=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_a_step_equals_the_whole_sequence(implementation, past, window, spare, same_length, seed):
    """A ring of any size with any number of tokens, then a step."""
    rng = np.random.default_rng(seed)
    total, slots = past + 1, window + spare
    q = random(rng, (1, 2, total, 8), mx.float32)
    k, v = (random(rng, (1, 1, total, 8), mx.float32) for _ in range(2))
    kv = np.zeros((1, 2, slots, 8), np.float32)
    for t in range(past):
        kv[:, 0, t % slots], kv[:, 1, t % slots] = np.array(k)[:, 0, t], np.array(v)[:, 0, t]
    one, zero = mx.ones((1, 1, 1, 4)), mx.zeros((1, 1, 1, 4))  # a rotation by nothing
    with run_by(implementation, "decode_attention"):
        out, _ = ops.decode_attention(
            *(q[:, :, past:], k[:, :, past:], v[:, :, past:], one, zero),
            ops.RingBuffer(mx.array(kv), past % slots),
            window=window,
            max_lookback=mx.array([[min(past, window)]]),
            cached_len=min(past, window) if same_length else None,
        )
    expected = dense_attention(q, k, v, window, np.arange(total)[None])[:, :, past:]
    assert relative_error(out, expected) < tolerance(5e-6)


# The kernel: order of threads, memory traffic, compilations, dispatch.

CHECKED = [
    pytest.param(Case(3, 16, 70, counted(80, 1), slots=71, write_pos=5), id="fp32"),
    pytest.param(Case(1, 20, 5, counted(2, 1), 2, slots=6, write_pos=5), id="odd-head"),
    pytest.param(Case(10, 16, 9, counted(80, 1), 8, slots=10), id="shared"),
    pytest.param(Case(2, 256, 70, counted(30, 1), slots=71, dtype=mx.float16), id="fp16"),
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
def test_each_key_is_read_once_per_head():
    case = Case(3, 64, 100, counted(70, 1), slots=101, write_pos=40)
    (launch,) = attend(case, mode="checked")[2]
    ring = launch.traffic["ring"]
    assert ring.elements_loaded == 2 * 70 * 64  # of the 101 slots, those that have been written
    assert ring.most_loads == 3


@needs_compiler
def test_one_compilation_for_all_windows():
    texts = set()
    for window, heads in ((5, 1), (9, 3)):
        case = Case(heads, 16, window, counted(9, 1), slots=window + 1)
        texts.add(attend(case)[2][-1].source)
    assert len(texts) == 1


@needs_compiler
def test_threadgroup_memory_fits():
    for dtype in metal.FLOATS:
        case = Case(2, 256, 6, counted(9, 1), slots=7, dtype=dtype)
        (launch,) = attend(case)[2]
        assert launch.counters.threadgroup_bytes <= 32768


@needs_compiler
def test_validation():
    with emulated(validate=True):
        for variant in KERNEL.variants:
            assert KERNEL.validated(*variant), KERNEL.validation


@needs_compiler
def test_unsupported_arguments_use_the_reference():
    narrow, case = Case(2, 4, 6, counted(9, 1), slots=7), Case(2, 16, 6, counted(9, 1), slots=7)
    mixed = ops.RingBuffer(case.ring.kv.astype(mx.bfloat16), 0)
    with emulated() as launches:
        out, _ = ops.decode_attention(
            narrow.q, narrow.k, narrow.v, *narrow.angles(), narrow.ring, window=6
        )
        ops.decode_attention(case.q, case.k, case.v, *case.angles(), mixed, window=6)
        assert not launches
        ops.decode_attention(case.q, case.k, case.v, *case.angles(), case.ring, window=6)
    assert launched(launches) == ["decode_attention"]
    assert_close("out", out, narrow.rotated().expected(), FORWARD_RTOL)


def test_wrong_shapes_are_named():
    case = Case(2, 16, 6, counted(9, 1), slots=7)
    cos, sin = case.angles()

    def call(k=case.k, ring=case.ring, **options):
        ops.decode_attention(case.q, k, case.v, cos, sin, ring, window=6, **options)

    with pytest.raises(ValueError, match=r"\[decode_attention\] q has shape .*, k \(1, 1, 0, 16\)"):
        call(k=case.k[:, :, 1:])
    with pytest.raises(ValueError, match=r"max_lookback has shape \(2, 1\)"):
        call(max_lookback=mx.zeros((2, 1), mx.int32))
    with pytest.raises(ValueError, match="write position -1"):
        call(ring=ops.RingBuffer(case.ring.kv, -1))
    with pytest.raises(ValueError, match=r"the ring has shape \(1, 2, 7, 8\)"):
        call(ring=ops.RingBuffer(case.ring.kv[..., :8], 0))
