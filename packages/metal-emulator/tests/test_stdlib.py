"""The standard library of the emulator agrees with the specification of Metal."""

from __future__ import annotations

import metal_emulator
import mlx.core as mx
import numpy as np
import pytest
from expressions import LANES, evaluate, per_thread
from metal_emulator.arrays import to_numpy
from requirements import needs_compiler
from sample_kernel import DTYPES

pytestmark = needs_compiler


@pytest.mark.parametrize("name", ["half", "bfloat"])
def test_every_16_bit_value_decodes_and_encodes(name):
    dtype, numpy_type = (mx.float16, np.float16) if name == "half" else (mx.bfloat16, None)
    bits = np.arange(65536, dtype=np.uint16)
    x = mx.array(bits).view(dtype)
    decoded = per_thread("y[i] = static_cast<float>(x0[i]);", x, count=65536)
    expected = (
        bits.view(numpy_type).astype(np.float32)
        if numpy_type
        else (bits.astype(np.uint32) << 16).view(np.float32)
    )
    number = ~np.isnan(expected)
    assert np.array_equal(decoded[number].view(np.uint32), expected[number].view(np.uint32))
    assert np.isnan(decoded[~number]).all()
    encoded = per_thread(
        f"y[i] = as_type<ushort>(static_cast<{name}>(x0[i]));",
        mx.array(decoded),
        dtype=mx.uint16,
        count=65536,
    )
    assert np.array_equal(encoded[number], bits[number])


@pytest.mark.parametrize("name", ["half", "bfloat"])
def test_floats_round_to_nearest_even(name):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**32, 20000, dtype=np.uint32).view(np.float32)
    near = np.float32(2.0) ** rng.integers(-30, 20, 20000) * rng.standard_normal(20000, np.float32)
    values = np.concatenate([values[~np.isnan(values)], near.astype(np.float32)])[:32768]
    dtype = mx.float16 if name == "half" else mx.bfloat16
    got = per_thread(
        f"y[i] = as_type<ushort>(static_cast<{name}>(x0[i]));",
        mx.array(values),
        dtype=mx.uint16,
        count=values.size,
    )
    expected = to_numpy(mx.array(values).astype(dtype)).view(np.uint16)
    assert np.array_equal(got, expected)


def test_arithmetic_of_small_floats_rounds_each_operation():
    x = mx.random.normal((LANES,), key=mx.random.key(0)).astype(mx.float16)
    z = mx.random.normal((LANES,), key=mx.random.key(1)).astype(mx.float16)
    got = per_thread("y[i] = x0[i] * x1[i] + x0[i];", x, z, dtype=mx.float16)
    a, b = np.array(x), np.array(z)
    assert np.array_equal(got, a * b + a)  # NumPy rounds after each operation
    assert per_thread("y[i] = int(sizeof(x0[i] * 2.0f));", x, dtype=mx.int32)[0] == 4
    assert per_thread("y[i] = int(sizeof(x0[i] * 2));", x, dtype=mx.int32)[0] == 2


UNARY = {
    "exp": np.exp,
    "exp2": np.exp2,
    "log": np.log,
    "log2": np.log2,
    "log10": np.log10,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sin": np.sin,
    "cos": np.cos,
    "tan": np.tan,
    "tanh": np.tanh,
    "sinh": np.sinh,
    "cosh": np.cosh,
    "atan": np.arctan,
    "asinh": np.arcsinh,
    "floor": np.floor,
    "ceil": np.ceil,
    "trunc": np.trunc,
    "rint": np.rint,
    "fract": lambda x: x - np.floor(x),
    "abs": np.abs,
    "sign": np.sign,
}


@pytest.mark.parametrize("space", ["metal", "metal::fast", "metal::precise"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_functions_of_one_number(space, dtype):
    x = mx.linspace(0.1, 3, LANES).astype(dtype)
    exact = np.array(x.astype(mx.float32)).astype(np.float64)
    rounding = {mx.float32: 3e-7, mx.float16: 1e-3, mx.bfloat16: 8e-3}[dtype]
    got = evaluate([f"{space}::{name}(x0[i])" for name in UNARY], x)
    for (expression, values), function in zip(got.items(), UNARY.values(), strict=True):
        expected = function(exact)
        np.testing.assert_allclose(values, expected, rtol=rounding, atol=1e-6, err_msg=expression)


BINARY = {
    "min": np.minimum,
    "max": np.maximum,
    "pow": np.power,
    "atan2": np.arctan2,
    "fmod": np.fmod,
    "copysign": np.copysign,
    "fdim": lambda a, b: np.maximum(a - b, 0),
}


def test_functions_of_two_numbers():
    a = np.linspace(0.1, 3, LANES, dtype=np.float32)
    b = np.linspace(2, -1.1, LANES, dtype=np.float32)
    got = evaluate([f"metal::{name}(x0[i], x1[i])" for name in BINARY], mx.array(a), mx.array(b))
    for (expression, values), function in zip(got.items(), BINARY.values(), strict=True):
        expected = function(a.astype(np.float64), b)
        np.testing.assert_allclose(values, expected, rtol=3e-7, atol=1e-7, err_msg=expression)


def test_functions_of_three_numbers():
    a = np.linspace(-3, 3, LANES, dtype=np.float32)
    cases = {
        "metal::clamp(x0[i], -1.0f, 2.0f)": a.clip(-1, 2),
        "metal::fma(x0[i], x0[i], 1.0f)": (a.astype(np.float64) * a + 1).astype(np.float32),
        "x0[i] * x0[i] + 1.0f": a * a + np.float32(1),  # no implicit fused multiply-add
        "metal::mix(x0[i], 1.0f, 0.25f)": a + (1 - a) * np.float32(0.25),
        "metal::select(x0[i], 9.0f, x0[i] > 0)": np.where(a > 0, 9, a),
    }
    for expression, values in evaluate(cases, mx.array(a)).items():
        assert np.array_equal(values, cases[expression]), expression


def test_special_numbers():
    x = mx.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, 1e-45, -3e38, *range(8, LANES)])
    a = np.array(x)
    cases = {
        "metal::isnan(x0[i])": np.isnan(a),
        "metal::isinf(x0[i])": np.isinf(a),
        "metal::isfinite(x0[i])": np.isfinite(a),
        "metal::signbit(x0[i])": np.signbit(a),
        # Of a number and a NaN both max and min are the number.
        "metal::isnan(metal::max(x0[i], 0.0f))": np.zeros(LANES, bool),
        "metal::isnan(metal::min(x0[i], 0.0f))": np.zeros(LANES, bool),
        "x0[i] == metal::numeric_limits<float>::infinity()": np.isposinf(a),
        "metal::isnan(metal::numeric_limits<half>::quiet_NaN())": np.ones(LANES, bool),
    }
    for expression, values in evaluate(cases, x, dtype=mx.bool_).items():
        assert np.array_equal(values, cases[expression]), expression


def test_integer_functions():
    special = [0, 1, 2, 3, 0x80000000, 0xFFFFFFFF, 12345]
    values = np.array([*special, *range(7, LANES)], dtype=np.uint32)
    numbers = values.tolist()
    cases = {
        "metal::popcount(x0[i])": [v.bit_count() for v in numbers],
        "metal::clz(x0[i])": [32 - v.bit_length() for v in numbers],
        "metal::ctz(x0[i])": [(v & -v).bit_length() - 1 if v else 32 for v in numbers],
        "metal::mulhi(x0[i], x0[i])": [v**2 >> 32 for v in numbers],
        "metal::rotate(x0[i], 5u)": [((v << 5) | (v >> 27)) & 0xFFFFFFFF for v in numbers],
        "metal::reverse_bits(x0[i])": [int(f"{v:032b}"[::-1], 2) for v in numbers],
        "metal::absdiff(x0[i], 7u)": [abs(v - 7) for v in numbers],
        "metal::min(x0[i], 9u)": [min(v, 9) for v in numbers],
        "metal::clamp(x0[i], 3u, 9u)": [max(3, min(v, 9)) for v in numbers],
    }
    for expression, got in evaluate(cases, mx.array(values), dtype=mx.uint32).items():
        assert got.tolist() == cases[expression], expression


def test_64_bit_arithmetic():
    values = np.array([2**63 + 11, 2**64 - 1, 12345678901234567, *range(3, LANES)], dtype=np.uint64)
    source = "const ulong v = x0[i]; y[i] = (v * 3ul + (v >> 33)) ^ (v % 1000003ul);"
    got = per_thread(source, mx.array(values), dtype=mx.uint64)
    with np.errstate(over="ignore"):
        expected = (values * np.uint64(3) + (values >> np.uint64(33))) ^ (
            values % np.uint64(1000003)
        )
    assert np.array_equal(got, expected)


def test_vectors():
    source = """
    float4 v = float4(x0[i], 1.0f, 2.0f, 3.0f);
    v = v * 2.0f + float4(1.0f);
    v += v;
    const float2 pair = float2(v.x, v[1]);
    const float4 wide = float4(pair, half2(half(0.5f), half(0.25f)));
    const uint3 whole = uint3(4u, 5u, 6u) << uint3(1u);
    const int4 back = int4(wide);
    y[i] = wide.x + wide.y + wide.z + wide.w + float(whole.z) + float(back.y) + dot(pair, pair)
        + (any(v > wide) ? 1000.0f : 0.0f) + (all(v == v) ? 2000.0f : 0.0f);
    """
    a = np.arange(LANES, dtype=np.float64)
    x, one = 4 * a + 2, 6.0
    expected = x + one + 0.5 + 0.25 + 12 + 6 + x * x + one * one + 1000 + 2000
    np.testing.assert_allclose(per_thread(source, mx.arange(LANES).astype(mx.float32)), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_simdgroup_reductions(dtype):
    x = mx.random.randint(-8, 9, (LANES,), key=mx.random.key(0)).astype(dtype)
    signs = mx.where(x < 0, mx.array(-1.0), mx.array(1.0)).astype(dtype)
    rows, row_signs = (np.array(v.astype(mx.float32)).reshape(2, 32) for v in (x, signs))
    cases = {
        "simd_sum(x0[i])": rows.sum(axis=1),
        "simd_max(x0[i])": rows.max(axis=1),
        "simd_min(x0[i])": rows.min(axis=1),
        "simd_product(x1[i])": row_signs.prod(axis=1),
    }
    for expression, got in evaluate(cases, x, signs).items():
        assert np.array_equal(got, np.repeat(cases[expression], 32)), expression


def test_integer_reductions_and_votes():
    values = np.random.default_rng(0).integers(0, 2**31, LANES).astype(np.int32)
    rows = values.reshape(2, 32)
    least = int(rows[0].min())
    odd = (rows % 2 == 1) * (1 << np.arange(32, dtype=np.int64))
    cases = {
        "simd_and(x0[i])": np.bitwise_and.reduce(rows, axis=1),
        "simd_or(x0[i])": np.bitwise_or.reduce(rows, axis=1),
        "simd_xor(x0[i])": np.bitwise_xor.reduce(rows, axis=1),
        "ulong(simd_ballot(x0[i] % 2 == 1))": odd.sum(axis=1),
        f"simd_any(x0[i] < {least})": (rows < least).any(axis=1),
        f"simd_all(x0[i] >= {least})": (rows >= least).all(axis=1),
    }
    for expression, got in evaluate(cases, mx.array(values), dtype=mx.uint32).items():
        assert got.tolist() == np.repeat(cases[expression], 32).tolist(), expression


def test_sums_are_pairwise_in_a_fixed_tree():
    """The tree adds neighbours first, as a butterfly over lane ^ 1, ^ 2, ... does."""
    values = np.random.default_rng(1).standard_normal(LANES).astype(np.float32)
    rows = values.reshape(2, 32)
    while rows.shape[1] > 1:
        rows = rows[:, 0::2] + rows[:, 1::2]
    got = per_thread("y[i] = simd_sum(x0[i]);", mx.array(values))
    assert np.array_equal(got, np.repeat(rows[:, 0], 32))


def test_prefixes():
    values = np.random.default_rng(2).integers(1, 3, LANES).astype(np.float32)
    rows = values.reshape(2, 32)
    sums, products = np.cumsum(rows, axis=1), np.cumprod(1 / rows, axis=1)
    cases = {
        "simd_prefix_inclusive_sum(x0[i])": sums,
        "simd_prefix_exclusive_sum(x0[i])": sums - rows,
        "simd_prefix_inclusive_product(1.0f / x0[i])": products,
        "simd_prefix_exclusive_product(1.0f / x0[i])": products * rows,
        "simd_prefix_inclusive_sum(uint(x0[i]))": sums,
    }
    for expression, got in evaluate(cases, mx.array(values)).items():
        assert np.array_equal(got, cases[expression].ravel()), expression


LANE = np.arange(LANES) % 32
BASE = np.arange(LANES) - LANE
MOVES = {
    "simd_shuffle(x0[i], ushort(31 - i % 32))": 31 - LANE,
    "simd_shuffle_xor(x0[i], 5)": LANE ^ 5,
    "simd_shuffle_rotate_up(x0[i], 3)": (LANE - 3) % 32,
    "simd_shuffle_rotate_down(x0[i], 3)": (LANE + 3) % 32,
    "simd_broadcast(x0[i], 7)": np.full(LANES, 7),
    "simd_broadcast_first(x0[i])": np.zeros(LANES, int),
    "quad_broadcast(x0[i], 2)": LANE // 4 * 4 + 2,
    "quad_shuffle_xor(x0[i], 1)": LANE ^ 1,
}


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.uint8])
def test_moves_between_lanes(dtype):
    for expression, got in evaluate(MOVES, mx.arange(LANES).astype(dtype)).items():
        assert np.array_equal(got, BASE + MOVES[expression]), expression


def test_shifts_between_lanes():
    up, down = "simd_shuffle_up(x0[i], 4)", "simd_shuffle_down(x0[i], 4)"
    fill_up = "simd_shuffle_and_fill_up(x0[i], 1000.0f + x0[i], 4)"
    fill_down = "simd_shuffle_and_fill_down(x0[i], 1000.0f + x0[i], 4)"
    got = evaluate([up, down, fill_up, fill_down], mx.arange(LANES).astype(mx.float32))
    lower, higher = LANE >= 4, LANE < 28  # the lanes that have such a neighbour
    assert np.array_equal(got[up][lower], (BASE + LANE - 4)[lower])
    assert np.array_equal(got[down][higher], (BASE + LANE + 4)[higher])
    assert np.array_equal(got[fill_up], BASE + np.where(lower, LANE - 4, 1000 + LANE + 28))
    assert np.array_equal(got[fill_down], BASE + np.where(higher, LANE + 4, 1000 + LANE - 28))


@pytest.mark.parametrize("type_name", ["ulong", "long", "bool"])
def test_metal_has_no_simd_sum_of(type_name):
    """A kernel that uses a function that Metal does not have must not compile."""
    with pytest.raises(metal_emulator.KernelError, match="does not compile: no matching function"):
        per_thread(f"y[i] = float(simd_sum({type_name}(i)));")


@pytest.mark.parametrize("name", ["log1p", "expm1", "erf", "lgamma", "cbrt"])
def test_metal_has_no(name):
    with pytest.raises(metal_emulator.KernelError, match=f"does not compile: .*{name}"):
        per_thread(f"y[i] = metal::{name}(1.0f);")


def test_literals_are_float():
    assert per_thread("y[i] = int(sizeof(0.1));", dtype=mx.int32)[0] == 4
    source = "y[i] = 0.1 + 0.2;"
    assert per_thread(source)[0] == np.float32(0.1) + np.float32(0.2)


def test_characters_are_signed():
    assert per_thread("y[i] = int(char(200));", dtype=mx.int32)[0] == -56


MATRIX = """
simdgroup_matrix<{T}, 8, 8> a, b;
simdgroup_matrix<float, 8, 8> c = make_filled_simdgroup_matrix<float, 8, 8>(1.0f);
simdgroup_load(a, x0, 10, ulong2(1, 2), {left});
simdgroup_load(b, x1, 8, ulong2(0, 0), {right});
simdgroup_multiply_accumulate(c, a, b, c);
simdgroup_store(c, y, 8, ulong2(0, 0), {result});
"""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", ["left", "right", "result"])
def test_simdgroup_matrices(dtype, transposed):
    left = mx.random.normal((10, 10), key=mx.random.key(0)).astype(dtype)
    right = mx.random.normal((8, 8), key=mx.random.key(1)).astype(dtype)
    flags = {name: str(name == transposed).lower() for name in ("left", "right", "result")}
    name = {mx.float32: "float", mx.float16: "half", mx.bfloat16: "bfloat"}[dtype]
    with metal_emulator.emulate("checked"):
        kernel = mx.fast.metal_kernel(
            name="matrices",
            input_names=["x0", "x1"],
            output_names=["y"],
            source=MATRIX.format(T=name, **flags),
        )
        (y,) = kernel(
            inputs=[left, right],
            output_shapes=[(8, 8)],
            output_dtypes=[mx.float32],
            grid=(32, 1, 1),
            threadgroup=(32, 1, 1),
        )
    a, b = (np.array(m.astype(mx.float32)).astype(np.float64) for m in (left, right))
    a = a[2:, 1:9]
    expected = 1 + (a.T if transposed == "left" else a) @ (b.T if transposed == "right" else b)
    np.testing.assert_allclose(
        np.array(y), expected.T if transposed == "result" else expected, rtol=1e-5, atol=1e-5
    )


def test_diagonal_matrices():
    source = """
    simdgroup_float8x8 a = simdgroup_float8x8(3.0f);
    a.thread_elements()[0] += 1.0f;
    simdgroup_float8x8 b;
    simdgroup_multiply(b, a, simdgroup_float8x8(2.0f));
    simdgroup_store(b, y);
    """
    got = per_thread(f"if (i < 32) {{ {source} }}").reshape(8, 8)
    expected = 6 * np.eye(8)
    expected[:, ::2] += 2  # the first of each lane's two elements
    np.testing.assert_allclose(got, expected)
