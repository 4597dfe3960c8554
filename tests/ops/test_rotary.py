"""Rotary position embedding: exact angles, and the rotation of queries and keys in one kernel."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from helpers.assertions import max_error, relative_error, tolerance
from helpers.attention_cases import DTYPES_AND_HEAD_DIMS, Case, assert_call
from helpers.emulated import emulated, launched, needs_compiler
from helpers.golden_cases import arrays, cases

from mlx_rgemma import ops
from mlx_rgemma.ops.rotary import KERNEL, rotate_heads, rotate_heads_reference


def test_angles_are_exact_at_any_position():
    """Against angles reduced in integer arithmetic, at positions that float32 cannot hold."""
    dims, theta = 128, 10000.0
    frequencies = ops.rotary_frequencies(dims, theta)
    positions = [0, 1, 2**20 + 1, 10_000_001, 2**31 + 7, 2**40 + 3]
    cos, sin = ops.rotary_angles(mx.array([positions], mx.int64), frequencies)
    turns = theta ** (-np.arange(0, dims, 2, dtype=np.float64) / dims) / (2 * np.pi)
    fixed = [int(t * 2.0**64) for t in turns]
    exact = np.array([[(p * f % 2**64) / 2.0**64 for f in fixed] for p in positions])
    assert max_error(cos[0, 0], np.cos(2 * np.pi * exact)) < 5e-7
    assert max_error(sin[0, 0], np.sin(2 * np.pi * exact)) < 5e-7


def test_the_rest_of_the_head_is_unchanged():
    x = mx.random.normal((1, 2, 3, 20))
    cos, sin = ops.rotary_angles(mx.array([[4, 5, 6]]), ops.rotary_frequencies(10, 10000.0))
    assert mx.array_equal(ops.apply_rotary(x, cos, sin)[..., 10:], x[..., 10:])


@pytest.mark.parametrize("name", [n for n, case in cases("attention").items() if "q_rope" in case])
def test_golden(name):
    """Against Google's code."""
    case = cases("attention")[name]
    q, k = (z.swapaxes(1, 2) for z in arrays(case, "q", "k"))
    positions = mx.array(case.get("positions", case.get("segment_pos")))
    cos, sin = ops.rotary_angles(positions, ops.rotary_frequencies(q.shape[-1] // 2, 10000.0))
    # In case `offset`, the float32 angles of the expected values at position 5,000 are the limit.
    allowed = tolerance(2e-4 if name == "offset" else 2e-6)
    for field, x in (("q_rope", q), ("k_rope", k)):
        found = ops.apply_rotary(x, cos, sin).swapaxes(1, 2)
        assert relative_error(found, case[field]) < allowed, field


@needs_compiler
@pytest.mark.parametrize("positions", [[[3, 4, 5], [1000000, 0, 1]], [[7, 8, 9]]], ids=str)
@pytest.mark.parametrize(("dtype", "head_dim"), DTYPES_AND_HEAD_DIMS)
def test_the_kernel_equals_the_reference(dtype, head_dim, positions):
    """To the bit, also in half precision; and the attention that follows is right."""
    case = Case(2, head_dim, 5, np.array(positions), 2, dtype=dtype)
    with emulated() as launches:
        got = rotate_heads(case.q, case.k, case.v, *case.angles())
    assert launched(launches) == ["rotary"]
    expected = rotate_heads_reference(case.q, case.k, case.v, *case.angles())
    assert all(mx.array_equal(a, b) for a, b in zip(got, expected, strict=True))
    assert_call(case)


@needs_compiler
def test_validation():
    with emulated(validate=True):
        for variant in KERNEL.variants:
            assert KERNEL.validated(*variant), KERNEL.validation


@needs_compiler
def test_unsupported_arguments_use_the_reference():
    case, narrow = Case(2, 16, 5, np.array([[3, 4]])), Case(2, 4, 5, np.array([[3, 4]]))
    with emulated() as launches:
        rotate_heads(case.q, case.k.astype(mx.float16), case.v, *case.angles())
        rotate_heads(narrow.q, narrow.k, narrow.v, *narrow.angles())
    assert not launches
