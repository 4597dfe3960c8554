"""What takes the place of MLX's slow operations on a Linux CPU, beside float64 and MLX's own."""

from __future__ import annotations

import io
import sys
from importlib import import_module

import mlx.core as mx
import numpy as np
import pytest
from conftest import ON_GPU, max_error, relative_error

from mlx_rgemma.ops import elementwise, exponential, linear, processor, quantized_linear
from mlx_rgemma.ops.attention_cpu import _blocks as attention_blocks
from mlx_rgemma.ops.attention_cpu import attend
from mlx_rgemma.ops.cross_entropy import cross_entropies
from mlx_rgemma.ops.linear import (
    BLOCK_OUTPUTS,
    BLOCK_PRODUCTS,
    FEW_ROWS,
    TILE_ELEMENTS,
    TILE_INPUTS,
    TILE_OUTPUTS,
    _blocks,
    tiled,
    tiles_pay,
)

linear_ops = import_module("mlx_rgemma.ops.linear")  # the name is that of a function, too

pytestmark = pytest.mark.skipif(
    ON_GPU or not sys.platform.startswith("linux"), reason="other machines have fast operations"
)

X = np.concatenate(
    [np.linspace(-30, 30, 20001), np.linspace(-0.01, 0.01, 2001), [-0.0, 0.0, -87.0, 87.0]]
).astype(np.float32)
EXACT = X.astype(np.float64)


def gradient(function, *arrays):
    """Gradients of a sum that weighs each output differently."""

    def total(*arrays):
        y = function(*arrays).astype(mx.float32)
        return (y * mx.cos(mx.arange(y.size).reshape(y.shape))).sum()

    return mx.grad(total, argnums=list(range(len(arrays))))(*arrays)


def test_sigmoid_is_accurate_relative_to_itself():
    exact = 1.0 / (1.0 + np.exp(-EXACT))
    got = np.array(exponential.sigmoid(mx.array(X)), np.float64)
    assert np.abs(got / exact - 1.0).max() < 6e-6
    assert max_error(exponential.sigmoid(mx.array(X)), exact) < 1.5e-7


@pytest.mark.parametrize("limit", [1e-6, 0.3, 12.0, 200.0])
def test_tanh_is_accurate_relative_to_itself(limit):
    x = np.linspace(-limit, limit, 1 << 16).astype(np.float32)
    exact = np.tanh(x.astype(np.float64))
    got = np.array(exponential.tanh(mx.array(x)), np.float64)
    assert not np.array_equal(got, np.array(mx.tanh(mx.array(x))))  # one's own
    assert np.abs(got / exact - 1.0).max() < 3e-7


def test_tanh_and_the_soft_cap_have_gradients():
    """mlx-lm's learned quantizations go through the logits."""
    x = mx.linspace(-90.0, 90.0, 1 << 15)
    slopes = mx.grad(lambda x: exponential.tanh(x).sum())(x)
    assert max_error(slopes, 1.0 - np.tanh(np.array(x, np.float64)) ** 2) < 1e-6
    cap = mx.array(30.0)
    slopes = mx.grad(lambda x: elementwise.soft_cap(x, cap).sum())(x)
    assert max_error(slopes, 1.0 - np.tanh(np.array(x, np.float64) / 30.0) ** 2) < 1e-6


def test_tanh_ends_where_float32_does():
    x = np.zeros(1 << 15, np.float32)
    x[:5] = [-np.inf, np.inf, -1e30, 1e30, np.nan]
    got = np.array(exponential.tanh(mx.array(x)))
    assert (got[:4] == [-1.0, 1.0, -1.0, 1.0]).all() and np.isnan(got[4]) and (got[5:] == 0.0).all()


@pytest.mark.parametrize("cap", [30.0, 1000.0, 0.0])
def test_cross_entropy_and_its_gradient(cap):
    """Rows of more than 2^15 scores go through the powers of two; beside float64."""
    rng = np.random.default_rng(0)
    scores = 20.0 * rng.standard_normal((5, 40_000))
    targets, weights = rng.integers(0, 40_000, 5), np.array([1.0, -2.0, 0.0, 3.0, 0.5])
    scores[0, targets[0]] = 300.0  # all but certain

    curve = np.tanh(scores / cap) if cap else None
    logits = scores if curve is None else cap * curve
    top = logits.max(axis=1, keepdims=True)
    powers = np.exp(logits - top)
    total = powers.sum(axis=1, keepdims=True)
    losses = (np.log(total) + top)[:, 0] - logits[np.arange(5), targets]
    slopes = powers / total
    slopes[np.arange(5), targets] -= 1.0
    slopes *= weights[:, None] * (1.0 if curve is None else 1.0 - curve**2)

    def weighted(scores):
        return (cross_entropies(scores, mx.array(targets), cap) * mx.array(weights)).sum()

    arrays = mx.array(scores)
    assert max_error(cross_entropies(arrays, mx.array(targets), cap), losses) < 3e-5
    assert max_error(mx.grad(weighted)(arrays), slopes) < 3e-6


@pytest.mark.parametrize("size", [100, 1 << 16], ids=["small", "large"])
def test_powers_of_two_are_exact_to_the_last_bit(size):
    x = np.linspace(-124.9, 126.9, size).astype(np.float32)
    exact = np.exp2(x.astype(np.float64))
    assert np.abs(np.array(exponential.exp2(mx.array(x)), np.float64) / exact - 1.0).max() < 1.2e-7
    whole = mx.arange(-125, 128).astype(mx.float32)
    many = mx.concatenate([whole] * (1 + size // 128))
    assert mx.array_equal(exponential.exp2(many), mx.power(2.0, many))


def test_powers_of_two_end_where_float32_does():
    x = np.zeros(1 << 16, np.float32)
    x[:6] = [-1e30, -np.inf, -150.0, 1e30, np.inf, np.nan]
    got = np.array(exponential.exp2(mx.array(x)))
    assert (got[:3] == 2.0**-125).all() and (got[3:5] == 2.0**127).all() and np.isnan(got[5])
    assert (got[6:] == 1.0).all()


@pytest.mark.parametrize("size", [1, 5000], ids=["small", "large"])
def test_decay_has_no_cancellation(size):
    log_a = -np.concatenate([[0.0, 200.0, 1e-38], np.logspace(-12, 1.9, size)])
    log_a = log_a.astype(np.float32)
    a, multiplier = exponential.decay(mx.array(log_a))
    exact = log_a.astype(np.float64)
    assert max_error(a, np.exp(exact)) < 1.2e-7
    expected = np.sqrt(-np.expm1(2.0 * exact))
    assert np.array(multiplier)[0] == 0.0
    assert np.abs(np.array(multiplier)[1:] / expected[1:] - 1.0).max() < 4e-7


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_gated_gelu_is_gelu(dtype):
    gate, x = mx.array(X).astype(dtype), mx.cos(mx.array(X)).astype(dtype)
    g, other = (np.array(z.astype(mx.float32), np.float64) for z in (gate, x))
    inner = np.sqrt(2.0 / np.pi) * (g + 0.044715 * g**3)
    exact = 0.5 * g * (1.0 + np.tanh(inner)) * other
    value, slope = (3e-7, 2e-6) if dtype == mx.float32 else (2.0**-8, 1e-2)
    assert relative_error(elementwise.gated_gelu(gate, x).astype(mx.float32), exact) < value
    plain = elementwise.gated_gelu.__wrapped__
    for ours, its in zip(
        gradient(elementwise.gated_gelu, gate, x), gradient(plain, gate, x), strict=True
    ):
        assert ours.dtype == dtype
        its = np.array(its.astype(mx.float32))
        assert relative_error(ours.astype(mx.float32), its) < slope


def test_soft_cap_caps():
    logits, cap = mx.array(X) * 10.0, mx.array(30.0)
    exact = 30.0 * np.tanh(EXACT / 3.0)
    assert max_error(elementwise.soft_cap(logits, cap), exact) < 1e-5
    small = mx.linspace(-1.0, 1.0, 101)  # a large cap must not multiply an error near 0
    far = np.array(small, np.float64)
    assert (
        max_error(elementwise.soft_cap(small, mx.array(1000.0)), 1000 * np.tanh(far / 1000)) < 1e-6
    )
    assert elementwise.soft_cap(mx.array([1e6, -1e6]), cap).tolist() == [30.0, -30.0]


@pytest.mark.parametrize("masked", [None, "shared", "by row"])
@pytest.mark.parametrize("length, keys", [(1, 40), (7, 40), (33, 65), (1, 9001), (6, 2049)])
def test_attention_is_mlx_attention(masked, length, keys):
    q = 3.0 * mx.random.normal((2, 5, length, 16), key=mx.random.key(0))
    k, v = mx.random.normal((2, 2, 1, keys, 16), key=mx.random.key(1))
    mask = None
    if masked is not None:
        rows = 1 if masked == "shared" else 2
        mask = mx.random.uniform(shape=(rows, 1, length, keys), key=mx.random.key(2)) < 0.4
        mask = mask | (mx.arange(keys) == 3)  # each query sees one key at least

    def its(q, k, v):
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=mask)

    def ours(q, k, v):
        return attend(q, k, v, 0.3, mask)

    bound = 5e-6 if keys < 1000 else 2e-5  # of sums of so many, MLX's own included
    assert max_error(ours(q, k, v), np.array(its(q, k, v))) < bound
    for one, other in zip(gradient(ours, q, k, v), gradient(its, q, k, v), strict=True):
        assert relative_error(one, np.array(other)) < bound


@pytest.mark.parametrize("shape", [(1, 512), (2, 4, 512), (9, 512), (1, 1, 7000)], ids=str)
@pytest.mark.parametrize("outputs", [1, 37, 1200, 3072])
def test_linear_multiplies(shape, outputs):
    x = mx.random.normal(shape, key=mx.random.key(0))
    weight = mx.random.normal((outputs, shape[-1]), key=mx.random.key(1))
    bias = mx.random.normal((outputs,), key=mx.random.key(2))
    exact = np.array(x, np.float64) @ np.array(weight, np.float64).T + np.array(bias)
    assert relative_error(linear(x, weight, bias), exact) < 3e-6
    ours = gradient(linear, x, weight, bias)
    its = gradient(lambda x, w, b: x @ w.T + b, x, weight, bias)
    for one, other in zip(ours, its, strict=True):
        assert relative_error(one, np.array(other)) < 3e-6


@pytest.mark.parametrize(
    "heads, width, keys, products",
    [(8, 64, 2049, 2), (10, 256, 2049, 4), (16, 256, 2049, 4), (16, 256, 1, 2), (8, 64, 1900, 2)],
)
def test_a_decode_step_wakes_no_second_thread(heads, width, keys, products):
    """Blocks that the BLAS multiplies in place, all of one product of keys and one of values."""
    size, even = attention_blocks(keys, heads * width)
    assert size * heads * width <= BLOCK_PRODUCTS
    assert even % size == 0 and 0 <= keys - even < size
    q, k = mx.zeros((1, heads, 1, width)), mx.zeros((1, 1, keys, width))
    graph = io.StringIO()
    mx.export_to_dot(graph, attend(q, k, k, 1.0, None))
    assert graph.getvalue().count("Matmul") == products
    graph = io.StringIO()
    mx.export_to_dot(graph, attend(mx.zeros((1, heads, 128, width)), k, k, 1.0, None))
    assert graph.getvalue().count("Matmul") == 2  # a chunk is not cut


@pytest.mark.parametrize("avx512", [True, False], ids=["AVX-512", "without"])
@pytest.mark.parametrize("shape", [(1, 512), (2, 4, 64), (1, 1, 1024)], ids=str)
@pytest.mark.parametrize("outputs", [64, 1536])
def test_tiles_multiply_as_the_weight_does(monkeypatch, shape, outputs, avx512):
    monkeypatch.setattr(linear_ops, "has_avx512", lambda: avx512)
    x = mx.random.normal(shape, key=mx.random.key(0))
    weight = mx.random.normal((outputs, shape[-1]), key=mx.random.key(1))
    bias = mx.random.normal((outputs,), key=mx.random.key(2))
    assert tiles_pay(x, weight)
    exact = np.array(x, np.float64) @ np.array(weight, np.float64).T + np.array(bias)
    tiles = tiled(weight)
    assert tiles.shape[0] == (outputs // TILE_OUTPUTS if avx512 else 1)
    got = linear(x, weight, bias, tiles)
    assert got.shape == exact.shape and relative_error(got, exact) < 3e-6


@pytest.mark.parametrize(
    "rows, outputs, inputs, dtype",
    [
        (FEW_ROWS + 1, 512, 512, mx.float32),
        (1, 500, 512, mx.float32),
        (1, 512, TILE_INPUTS + 1, mx.float32),
        (1, 64 * (TILE_ELEMENTS // 65536 + 1), 1024, mx.float32),
        (1, 512, 512, mx.bfloat16),
    ],
)
def test_no_tiles_where_they_do_not_pay(monkeypatch, rows, outputs, inputs, dtype):
    monkeypatch.setattr(linear_ops, "has_avx512", lambda: True)
    assert not tiles_pay(mx.zeros((rows, inputs), dtype), mx.zeros((outputs, inputs), dtype))


def test_any_number_of_outputs_is_one_tile_without_avx512(monkeypatch):
    monkeypatch.setattr(linear_ops, "has_avx512", lambda: False)
    x, weight = mx.random.normal((3, 40)), mx.random.normal((501, 40))
    assert tiles_pay(x, weight)
    assert relative_error(linear(x, weight, None, tiled(weight)), np.array(x @ weight.T)) < 3e-6


def test_few_rows_go_in_blocks_that_the_blas_reads_in_place():
    for rows in range(1, FEW_ROWS + 1):
        for outputs, inputs in ((3072, 512), (2560, 2560), (2560, 7680), (256000, 2560)):
            blocks = _blocks(rows, outputs, inputs)
            size = outputs // blocks
            assert blocks > 1 and size * blocks == outputs and size >= 16
            assert rows * size <= BLOCK_OUTPUTS and rows * size * inputs <= BLOCK_PRODUCTS
    assert _blocks(FEW_ROWS + 1, 3072, 512) == 1
    assert _blocks(1, 4099, 2560) == 1  # a prime


@pytest.mark.parametrize("bits", [4, 5])
def test_quantized_weights_are_expanded_in_little_more_than_their_own_memory(bits):
    how = {"group_size": 64, "bits": bits, "mode": "affine"}
    weight = mx.random.normal((8192, 2560), key=mx.random.key(0))
    quantized = mx.quantize(weight, **how)
    mx.eval(quantized)
    expected = np.array(mx.dequantize(*quantized, **how))
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    expanded = linear_ops.expand_quantized(*quantized, **how)
    mx.eval(expanded)
    assert np.array_equal(np.array(expanded), expected)
    assert mx.get_peak_memory() - before < 1.5 * expanded.nbytes


@pytest.mark.parametrize("at_once", [256, 96 * 256], ids=["row by row", "whole"])
@pytest.mark.parametrize("mode, bits", [("affine", 4), ("affine", 8), ("mxfp4", 4), ("mxfp8", 8)])
@pytest.mark.parametrize("rows", [1, 4, 5, 20, 40])
def test_quantized_weights_expanded_or_not_multiply_alike(mode, bits, rows, at_once, monkeypatch):
    monkeypatch.setattr(linear_ops, "EXPANDED_AT_ONCE", at_once)
    group_size = 64 if mode == "affine" else 32
    how = {"group_size": group_size, "bits": bits, "mode": mode}
    x = mx.random.normal((rows, 256), key=mx.random.key(0))
    weight = mx.random.normal((96, 256), key=mx.random.key(1))
    quantized = mx.quantize(weight, **how)
    packed, scales, biases = (*quantized, None)[:3]
    expected = mx.quantized_matmul(x, packed, scales, biases, transpose=True, **how)
    got = quantized_linear(x, packed, scales, biases, **how)
    assert relative_error(got, np.array(expected)) < 3e-6
    ours = gradient(lambda x: quantized_linear(x, packed, scales, biases, **how), x)[0]
    its = gradient(
        lambda x: mx.quantized_matmul(x, packed, scales, biases, transpose=True, **how), x
    )[0]
    assert relative_error(ours, np.array(its)) < 3e-6


@pytest.mark.parametrize(
    "own, limits, expected",
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, np.inf),
        ("0::/a/b\n", {"a/cpu.max": "200000 100000\n", "a/b/cpu.max": "max 100000\n"}, 2.0),
        ("0::/a\n", {"cpu.max": "50000 100000\n", "a/cpu.max": "300000 100000\n"}, 0.5),
        ("0::/gone\n", {}, np.inf),
        ("0::/\n", {"cpu.max": "not a number\n"}, np.inf),
        ("0::/\n", {"cpu.max": "1 0\n"}, np.inf),
        ("4:memory:/\n", {"memory/cpu.max": "100000 100000\n"}, np.inf),
        (
            "7:cpu,cpuacct:/x\n0::/\n",
            {
                "cpu,cpuacct/x/cpu.cfs_quota_us": "400000\n",
                "cpu,cpuacct/x/cpu.cfs_period_us": "100000\n",
            },
            4.0,
        ),
        (
            "7:cpu:/\n",
            {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
            np.inf,
        ),
    ],
)
def test_a_containers_share_of_the_cores(tmp_path, own, limits, expected):
    """Of either version of control groups; the narrowest of a group and those above it counts."""
    groups, process = tmp_path / "groups", tmp_path / "cgroup"
    groups.mkdir()
    process.write_text(own)
    for name, text in limits.items():
        (groups / name).parent.mkdir(parents=True, exist_ok=True)
        (groups / name).write_text(text)
    assert processor._quota(groups, process) == expected
    assert processor._quota(groups, tmp_path / "none") == np.inf


def test_there_is_always_a_core(monkeypatch):
    for quota, expected in ((0.3, 1), (1.9, 1), (2.0, 2), (np.inf, 3)):
        monkeypatch.setattr(processor, "_quota", lambda quota=quota: quota)
        monkeypatch.setattr(processor.os, "sched_getaffinity", lambda _: {0, 1, 2})
        assert processor.cores.__wrapped__() == expected
