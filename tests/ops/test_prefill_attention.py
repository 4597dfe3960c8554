"""The attention kernels, emulated from their Metal source, against float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from conftest import golden, relative_error
from helpers.attention_cases import Case, counted, packed
from helpers.emulated import FORWARD_RTOL, GRADIENT_RTOL, assert_close, emulated, needs_compiler
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_rgemma.ops.attention_kernels import RING, ROTARY, WINDOW

from mlx_rgemma import ops
from mlx_rgemma.ops import attention, attention_kernels, kernels
from mlx_rgemma.ops.autograd import inference_mode

pytestmark = needs_compiler

HEAD_DIMS = (16, 24, 32, 48, 64, 128, 256)
DTYPES_AND_HEAD_DIMS = [
    *(pytest.param(mx.float32, d, id=f"fp32-{d}") for d in (*HEAD_DIMS, 20)),
    *(pytest.param(mx.bfloat16, d, id=f"bf16-{d}") for d in (16, 256)),
    *(pytest.param(mx.float16, d, id=f"fp16-{d}") for d in (64, 256)),
]
PACKED = packed(45, 20, start=9)


def window(case: Case, **how):
    """-> the attention of a chunk that has been rotated, the launches."""
    with emulated(**how) as launches:
        out = ops.windowed_attention(
            case.q, case.k, case.v, window=case.window, reach=case.reach, ring=case.ring
        )
        mx.eval(out)
    return out, launches


def local(case: Case, **how):
    """-> the attention of a whole call, what belongs into the ring, the launches."""
    with emulated(**how) as launches:
        out, kv = ops.prefill_attention(
            *(case.q, case.k, case.v, *case.angles()),
            window=case.window,
            reach=case.reach,
            ring=case.ring,
        )
        mx.eval(out, kv)
    return out, kv, launches


def assert_window(case: Case) -> None:
    out, launches = window(case)
    assert len(launches) == 1
    assert_close("out", out, case.expected(), FORWARD_RTOL)


def assert_local(case: Case) -> None:
    """Also in half precision the rotated keys are those of the plain operations, to the bit."""
    out, kv, _ = local(case)
    turned = case.rotated()
    assert_close("out", out, turned.expected(), FORWARD_RTOL)
    assert mx.array_equal(kv, mx.concatenate([turned.k, turned.v], axis=1))


# Every head size and dtype.


@pytest.mark.parametrize(("dtype", "head_dim"), DTYPES_AND_HEAD_DIMS)
def test_chunk(dtype, head_dim):
    case = Case(3, head_dim, 12, PACKED, slots=13, head=5, dtype=dtype)
    assert_window(case)


@pytest.mark.parametrize(("dtype", "head_dim"), DTYPES_AND_HEAD_DIMS)
def test_step(dtype, head_dim):
    case = Case(3, head_dim, 150, counted(140, 1), slots=151, head=7, dtype=dtype)
    assert_local(case)


@pytest.mark.parametrize(("dtype", "head_dim"), DTYPES_AND_HEAD_DIMS)
def test_rotation_before_a_chunk(dtype, head_dim):
    case = Case(2, head_dim, 5, np.array([[3, 4, 5], [1000000, 0, 1]]), 2, dtype=dtype)
    assert_local(case)


# Lengths, heads, windows, rings, documents: on one compilation.


@pytest.mark.parametrize("heads", [1, 2, 5, 10, 16])
@pytest.mark.parametrize("length", [1, 3, 37, 70])
def test_rows_of_a_tile(length, heads):
    case = Case(heads, 16, 24, counted(0, length), bounded=False)
    assert_window(case)


@pytest.mark.parametrize("head", range(8))
@pytest.mark.parametrize("length", [1, 12])
def test_ring_turned_to_any_head(length, head):
    case = Case(2, 16, 7, counted(50, length), slots=8, head=head, bounded=False)
    assert_window(case)
    if length == 1:
        assert_local(case)


@pytest.mark.parametrize("slots", [3, 7, 8, 20], ids=lambda n: f"{n}-slots")
@pytest.mark.parametrize("length", [1, 9])
def test_ring_smaller_and_larger_than_the_window(length, slots):
    case = Case(2, 16, 7, counted(50, length), slots=slots, head=2, bounded=False)
    assert_window(case)
    assert_local(case)


@pytest.mark.parametrize("held", [0, 1, 6, 12])
def test_slots_never_written_are_never_read(held):
    # The token `held` back lies in slot head - held; whatever is older is not a number.
    for length in (1, 30):
        case = Case(3, 16, 12, counted(held, length), slots=13, head=4)
        unwritten = [(4 - d) % 13 for d in range(held + 1, 14)]
        expected = case.rotated().expected()
        case.ring.kv[:, :, mx.array(unwritten)] = mx.nan
        assert_close("out", local(case)[0], expected, FORWARD_RTOL)


def test_ragged_rows():
    positions = np.stack([counted(0, 20)[0], counted(40, 20)[0], packed(20, 3, 4, start=7)[0]])
    case = Case(3, 16, 9, positions, batch=3, slots=10, head=6)
    assert_window(case)
    step = Case(3, 16, 9, positions[:, :1], batch=3, slots=10, head=6)
    assert_local(step)


def test_rows_share_positions():
    case = Case(3, 16, 9, counted(4, 6), batch=3, slots=10, head=6)
    assert_local(case)
    step = Case(3, 16, 9, counted(4, 1), batch=3, slots=10, head=6)
    assert_local(step)


def test_heads_share_their_reads_in_large_batches():
    case = Case(10, 16, 30, counted(99, 1), batch=8, slots=31, head=11, bounded=False)
    assert_local(case)
    assert dict(local(case)[2][0].template)["HEADS"] == 2


def test_a_query_that_sees_nothing_gives_zero():
    case = Case(2, 16, 5, counted(8, 3), slots=6)
    case.reach = mx.array([[-1, 2, -1]])
    out, _ = window(case)
    assert not mx.any(out[:, :, 0::2])
    assert mx.all(mx.isfinite(out))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_call(data):
    draw = data.draw
    batch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 16))
    length, window_size = draw(st.integers(1, 40)), draw(st.integers(0, 50))
    slots = draw(st.sampled_from([0, window_size + 1, window_size + 4]))
    head = draw(st.integers(0, max(0, slots - 1)))
    rows = []
    for _ in range(batch):
        borders = draw(st.lists(st.integers(0, length - 1), max_size=3))
        # Without a ring there is nothing before the chunk.
        start = draw(st.integers(0, 60)) if slots else 0
        rows.append(packed(length, *sorted(borders), start=start)[0])
    case = Case(heads, 16, window_size, np.stack(rows), batch, slots, head, seed=length)
    assert_local(case)


def test_large_scores():
    case = Case(2, 16, 12, PACKED, slots=13, head=5)
    case.q = case.q * 100.0
    assert_window(case)


# Golden data, and one way of reading against another.


GOLDEN = golden("ops/attention.npz")


@pytest.mark.parametrize("name", sorted({key.split("/")[0] for key in GOLDEN}))
def test_golden(name):
    def field(key):
        return GOLDEN.get(f"{name}/{key}")

    segment_pos, size = field("segment_pos"), int(field("window"))
    positions = mx.array(field("positions") if segment_pos is None else segment_pos)
    q, k, v = (mx.array(field(key).swapaxes(1, 2)) for key in "qkv")
    cos, sin = ops.rotary_angles(positions, ops.rotary_frequencies(q.shape[-1] // 2, 10000.0))
    reach = None if segment_pos is None else mx.minimum(positions, size)
    with emulated():
        out, _ = ops.prefill_attention(q, k, v, cos, sin, window=size, reach=reach)
    # In case `offset`, the reference's own float32 angles at position 5,000 limit the rotation.
    tolerance = 2e-4 if name == "offset" else 2e-6
    assert relative_error(out.swapaxes(1, 2), field("out_keys_window_plus_1")) < tolerance


@pytest.mark.parametrize("chunks", [(40,), (1,) * 40, (7, 1, 1, 20, 3, 8)], ids=str)
def test_chunks_and_steps_agree(chunks):
    size, slots = 9, 10
    whole = Case(3, 16, size, packed(40, 0, 17, 25, 27), batch=2)
    cos, sin = whole.angles()
    kv, head, first, outputs = mx.full((2, 2, slots, 16), mx.nan), 0, 0, []
    with emulated():
        for length in chunks:
            part = slice(first, first + length)
            arrays = (whole.q, whole.k, whole.v, cos, sin)
            out, new = ops.prefill_attention(
                *(x[:, :, part] for x in arrays),
                window=size,
                reach=whole.reach[:, part],
                ring=ops.Ring(kv, head) if first else None,
            )
            outputs.append(out)
            for i in range(max(0, length - slots), length):
                kv[:, :, (head + i) % slots] = new[:, :, i]
            head, first = (head + length) % slots, first + length
    expected = whole.rotated().expected()
    assert_close("out", mx.concatenate(outputs, axis=2), expected, FORWARD_RTOL)


# What surrounds the numbers: order of threads, accesses, traffic, memory, transformations.

CHECKED = [
    pytest.param(Case(3, 16, 12, PACKED, slots=13, head=5), id="chunk-fp32"),
    pytest.param(Case(1, 20, 6, counted(9, 11), slots=7, head=3), id="chunk-odd-head"),
    pytest.param(Case(3, 256, 12, PACKED, slots=13, dtype=mx.bfloat16), id="chunk-bf16"),
    pytest.param(Case(2, 256, 6, counted(0, 4), dtype=mx.float32), id="chunk-wide-fp32"),
    pytest.param(Case(3, 16, 70, counted(80, 1), slots=71, head=5), id="step-fp32"),
    pytest.param(Case(1, 20, 5, counted(2, 1), 2, slots=6, head=5), id="step-odd-head"),
    pytest.param(Case(10, 16, 9, counted(80, 1), 8, slots=10), id="step-shared"),
    pytest.param(Case(2, 256, 70, counted(30, 1), slots=71, dtype=mx.float16), id="step-fp16"),
]


@pytest.mark.parametrize("case", CHECKED)
def test_checked_in_every_order(case):
    out, kv, _ = local(case)
    for order in ("forward", "reverse", "random"):
        got = local(case, mode="checked", order=order)
        assert mx.array_equal(got[0], out), order
        assert mx.array_equal(got[1], kv), order


@pytest.mark.parametrize("head_dim", [16, 256])
def test_a_chunk_reads_each_key_once_a_threadgroup(head_dim):
    size, length, heads = 20, 64, 2
    case = Case(heads, head_dim, size, counted(500, length), slots=32, head=3, bounded=False)
    (launch,) = window(case, mode="checked")[1]
    rows = attention_kernels.window_tile(head_dim, mx.float32)[0]
    tokens = rows // heads
    # A tile of queries needs the keys of its own tokens and a window before them, and the last of
    # them up to 7 times more: fragments have 8 rows.
    keys = -(-(size + tokens) // 8) * 8
    assert launch.traffic["kv"].loads <= 2 * head_dim * keys * length // tokens
    assert launch.traffic["kv"].most_loads <= -(-(size + tokens) // tokens) + 1 + 7
    # Of the ring's 32 slots, the 20 that the first queries see.
    assert launch.traffic["ring"].elements_loaded == 2 * size * head_dim
    assert launch.traffic["q"].loads == case.q.size
    assert launch.traffic["out"].stores == case.q.size


def test_a_step_reads_each_key_once_a_head():
    case = Case(3, 64, 100, counted(70, 1), slots=101, head=40)
    (launch,) = local(case, mode="checked")[2]
    ring = launch.traffic["ring"]
    assert ring.elements_loaded == 2 * 70 * 64  # of the 101 slots, those that have been written
    assert ring.most_loads == 3


def test_memory_does_not_grow_with_the_length():
    used = []
    for length in (8, 200):
        (launch,) = window(Case(2, 16, 6, counted(9, length), slots=7))[1]
        assert [x.shape for x in launch.outputs] == [(1, length, 2, 16)]
        used.append(launch.counters.threadgroup_bytes)
    assert used[0] == used[1] <= 32768
    for dtype in metal.FLOATS:  # and of the largest heads
        (launch,) = window(Case(1, 256, 6, counted(0, 1), dtype=dtype))[1]
        assert launch.counters.threadgroup_bytes <= 32768


@pytest.mark.parametrize("lengths", [(1, 1), (8, 33)], ids=["step", "chunk"])
def test_one_compilation_for_all_lengths(lengths):
    texts = set()
    for length, size, heads in zip(lengths, (5, 9), (1, 3), strict=True):
        case = Case(heads, 16, size, counted(9, length), slots=size + 1)
        texts.add(local(case)[2][-1].source)
    assert len(texts) == 1


def dispatched(function, *arrays: mx.array) -> list[str]:
    """Names of the primitives of a function's graph, without views."""
    views = {"Reshape", "Transpose", "Slice", "Squeeze", "ExpandDims", "Broadcast", "Unflatten"}
    views |= {"Flatten", "Split"}
    names: list[str] = []

    def note(call):
        if call["type"] == "primitive" and call["name"] not in views:
            names.append(call["name"])

    with inference_mode():
        mx.export_function(note, function, *arrays)
    return names


@pytest.mark.parametrize(("length", "launches"), [(1, 1), (5, 2)], ids=["step", "chunk"])
def test_launches_of_a_layer(length, launches, monkeypatch):
    # As the projections give them: tokens before heads.
    kv = mx.zeros((1, 2, 8, 16))
    cos, sin = ops.rotary_angles(mx.arange(length)[None], ops.rotary_frequencies(8, 10000.0))

    def layer(q, k, v):
        q = q.reshape(1, length, 3, 16).swapaxes(1, 2)
        out, _ = ops.prefill_attention(q, k, v, cos, sin, window=7, ring=ops.Ring(kv, 3))
        return out.swapaxes(1, 2).reshape(1, length, 48)

    mx.eval(kv, cos, sin)
    arrays = [mx.zeros((1, length, 48)), *[mx.zeros((1, 1, length, 16))] * 2]
    monkeypatch.setenv(kernels.VARIABLE, "metal")
    assert dispatched(layer, *arrays) == ["CustomKernel"] * launches


@pytest.mark.parametrize("length", [1, 14], ids=["step", "chunk"])
def test_gradients_are_those_of_the_plain_operations(length):
    case = Case(3, 16, 6, packed(length, 7 if length > 1 else 1, start=4), slots=7, head=2)
    arrays = (case.q, case.k, case.v, *case.angles(), case.ring.kv)
    weight = mx.random.normal(case.q.shape, key=mx.random.key(1))

    def loss(q, k, v, cos, sin, kv):
        ring = ops.Ring(kv, case.head)
        out, new = ops.prefill_attention(
            *(q, k, v, cos, sin), window=case.window, reach=case.reach, ring=ring
        )
        return (out * weight).sum() + mx.square(new).sum()

    with emulated():
        value, got = mx.value_and_grad(loss, argnums=tuple(range(6)))(*arrays)
        mx.eval(value, got)
    with emulated(switch="off") as launches:
        plain_value, expected = mx.value_and_grad(loss, argnums=tuple(range(6)))(*arrays)
    assert not launches
    assert abs(value.item() - plain_value.item()) < 1e-4 * abs(plain_value.item())
    for one, other in zip(got, expected, strict=True):
        assert np.abs(np.array(other)).max() > 0
        assert relative_error(one, np.array(other)) < GRADIENT_RTOL


def test_vmap_is_that_of_the_plain_operations(monkeypatch):
    case = Case(3, 16, 6, counted(0, 9), batch=2, bounded=False)
    # A launch in the middle of the trace of a graph, as on a Mac: nothing is computed there.
    monkeypatch.setattr(attention, "launch_window", lambda q, *_: [mx.zeros_like(q)])

    def one(q, k, v):
        return ops.windowed_attention(q[None], k[None], v[None], window=6)[0]

    monkeypatch.setenv(kernels.VARIABLE, "metal")
    out = mx.vmap(one)(case.q, case.k, case.v)
    assert_close("out", out, case.expected(), FORWARD_RTOL)


@pytest.mark.parametrize("kernel", [WINDOW, RING, ROTARY], ids=lambda kernel: kernel.name)
def test_trial(kernel):
    with emulated(switch="auto"):
        metal.reset()
        for variant in kernel.variants:
            assert kernel.validated(*variant), kernel.validation


def test_what_the_kernels_do_not_take_goes_the_plain_way():
    case, narrow = Case(2, 16, 6, counted(0, 4)), Case(2, 4, 6, counted(0, 4))
    other_dtype = ops.Ring(mx.zeros((1, 2, 7, 16), mx.bfloat16), 0)
    arrays = (case.q, case.k, case.v)
    with emulated() as launches:
        out = ops.windowed_attention(*arrays, window=6, reach=case.reach, ring=other_dtype)
        small = ops.windowed_attention(narrow.q, narrow.k, narrow.v, window=6)
        assert not launches
        ops.windowed_attention(*arrays, window=6)
        assert len(launches) == 1
    assert_close("out", out, case.expected(), FORWARD_RTOL)
    assert_close("out", small, narrow.expected(), FORWARD_RTOL)


def test_wrong_shapes_are_named():
    case = Case(2, 16, 6, counted(0, 4), slots=7)
    with pytest.raises(ValueError, match=r"\[windowed_attention\] q has shape"):
        ops.windowed_attention(case.q, case.q, case.v, window=6)
    with pytest.raises(ValueError, match=r"reach has shape \(1, 3\)"):
        ops.windowed_attention(case.q, case.k, case.v, window=6, reach=case.reach[:, 1:])
    with pytest.raises(ValueError, match="head 7"):
        ring = ops.Ring(case.ring.kv, 7)
        ops.windowed_attention(case.q, case.k, case.v, window=6, ring=ring)
    with pytest.raises(ValueError, match="cos has shape"):
        cos, sin = case.angles()
        ops.prefill_attention(case.q, case.k, case.v, cos[:, :, 1:], sin, window=6)
