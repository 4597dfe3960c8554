"""The kernels of MLX and mlx-lm run in the emulator and agree with MLX's CPU operations.

These kernels run on Macs every day, and neither they nor their references were written for the
emulator: agreement is evidence that the emulator is right.
"""

from __future__ import annotations

import metal_emulator
import mlx.core as mx
import numpy as np
import pytest
from mlx_kernels import error, gated_delta_inputs, mlx_lm_module, run_header
from requirements import needs_compiler
from sample_kernel import DTYPES

pytestmark = needs_compiler

# One rounding to the output's type, relative to the largest value.
TOLERANCE = {mx.float32: 2e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("size", [33, 128, 500])
def test_softmax(size):
    x = random(3, size)
    threads = -(-size // 128) * 32
    _, (y,) = run_header(
        "softmax.h",
        "softmax_single_row",
        "softmax_single_row<float, float, 4>",
        [x, (x.shape, np.float32), np.array([size], np.int32)],
        (3 * threads, 1, 1),
        (threads, 1, 1),
    )
    np.testing.assert_allclose(y, np.array(mx.softmax(mx.array(x), axis=-1)), rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("size", [100, 5000])
def test_softmax_looped(size):
    x = random(2, size)
    _, (y,) = run_header(
        "softmax.h",
        "softmax_looped",
        "softmax_looped<float, float, 4>",
        [x, (x.shape, np.float32), np.array([size], np.int32)],
        (2048, 1, 1),
        (1024, 1, 1),
    )
    np.testing.assert_allclose(y, np.array(mx.softmax(mx.array(x), axis=-1)), rtol=2e-6, atol=1e-9)


def test_logsumexp():
    x = random(4, 200)
    _, (y,) = run_header(
        "logsumexp.h",
        "logsumexp",
        "logsumexp<float, float, 4>",
        [x, ((4,), np.float32), np.array([200], np.int32)],
        (4 * 64, 1, 1),
        (64, 1, 1),
    )
    np.testing.assert_allclose(y, np.array(mx.logsumexp(mx.array(x), axis=-1)), rtol=1e-6)


SCANS = {
    "sum": ("CumSum<float>", lambda x, **k: mx.cumsum(x, axis=-1, **k)),
    "product": ("CumProd<float>", lambda x, **k: mx.cumprod(x, axis=-1, **k)),
    "maximum": ("CumMax<float>", lambda x, **k: mx.cummax(x, axis=-1, **k)),
}


@pytest.fixture
def clang(monkeypatch):
    """Compile with clang, as g++ does not accept all headers of MLX."""
    found, reason = metal_emulator.compiler("clang")
    if found is None:
        pytest.skip(reason)
    monkeypatch.setenv("METAL_EMULATOR_CXX", " ".join(found.command))


@pytest.mark.usefixtures("clang")
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("inclusive", [False, True], ids=["exclusive", "inclusive"])
@pytest.mark.parametrize("name", SCANS)
def test_scan(name, inclusive, reverse):
    op, reference = SCANS[name]
    x = 1 + 0.1 * random(3, 300)
    flags = f"{str(inclusive).lower()}, {str(reverse).lower()}"
    _, (y,) = run_header(
        "scan.h",
        "contiguous_scan",
        f"contiguous_scan<float, float, {op}, 4, {flags}>",
        [x, (x.shape, np.float32), np.array([x.shape[1]], np.uint64)],
        (1024, 3, 1),
        (1024, 1, 1),
    )
    expected = np.array(reference(mx.array(x), reverse=reverse, inclusive=inclusive))
    finite = np.isfinite(expected)  # the exclusive maximum starts from minus infinity
    np.testing.assert_allclose(y[finite], expected[finite], rtol=3e-6)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_attention_of_single_queries(causal):
    heads, kv_heads, queries, keys, size = 4, 2, 3, 50, 64
    q, k, v = (
        random(heads, queries, size),
        random(kv_heads, keys, size),
        random(kv_heads, keys, size, seed=1),
    )
    number = {"int": lambda i: np.array([i], np.int32), "size": lambda i: np.array([i], np.uint64)}
    unused = np.zeros(1, np.int32)
    _, (out,) = run_header(
        "sdpa_vector.h",
        "sdpa_vector",
        "sdpa_vector<float, 64>",
        [
            q,
            k,
            v,
            ((heads, queries, size), np.float32),
            number["int"](heads // kv_heads),
            number["int"](keys),
            *[number["size"](stride) for stride in (keys * size, size, keys * size, size)],
            np.array([size**-0.5], np.float32),
            np.zeros(1, np.bool_),
            np.zeros(1, np.float32),
            unused,
            unused,
            unused,
            np.zeros(1, np.float32),
            number["int"](heads),
        ],
        (heads * 1024, queries, 1),
        (1024, 1, 1),
        function_constants={20: 0, 21: 0, 22: int(causal), 23: 0, 24: 0, 25: 0, 26: 0},
    )
    expected = mx.fast.scaled_dot_product_attention(
        *[mx.array(x)[None] for x in (q, k, v)],
        scale=size**-0.5,
        mask="causal" if causal else None,
    )
    np.testing.assert_allclose(out, np.array(expected)[0], rtol=1e-5, atol=2e-6)


ATTENTION = np.dtype(
    [
        *[(name, np.int32) for name in ("B", "H", "D", "qL", "kL", "gqa_factor")],
        ("scale", np.float32),
        *[
            (n, np.int32)
            for n in ("NQ", "NK", "NQ_aligned", "NK_aligned", "qL_rem", "kL_rem", "qL_off")
        ],
        *[(f"{name}_strides", np.int64, 3) for name in "QKVO"],
    ],
    align=True,
)


def test_attention_with_simdgroup_matrices():
    """MLX's prefill attention, with simdgroup matrices, function constants and structs."""
    heads, length, size, block_q, block_k = 2, 40, 64, 32, 32
    q, k, v = (random(heads, length, size, seed=i) for i in range(3))
    params = np.zeros(1, ATTENTION)
    strides = (heads * length * size, length * size, size)
    values = {"B": 1, "H": heads, "D": size, "qL": length, "kL": length, "gqa_factor": 1}
    values |= {"scale": size**-0.5, "NQ": 2, "NK": 2, "NQ_aligned": 1, "NK_aligned": 1}
    values |= {"qL_rem": length % block_q, "kL_rem": length % block_k, "qL_off": 0}
    values |= {f"{name}_strides": strides for name in "QKVO"}
    for name, value in values.items():
        params[name] = value
    constants = {200: 0, 201: 0, 300: 0, 301: 1, 302: 0, 303: 0}
    _, (out, _) = run_header(
        "steel/attn/kernels/steel_attention.h",
        "attention",
        f"attention<float, {block_q}, {block_k}, {size}, {size}, 4, 1, float, float>",
        [
            q,
            k,
            v,
            ((heads, length, size), np.float32),
            params,
            np.zeros(3, np.int64),
            np.zeros(1, np.float32),
            np.zeros(1, np.float32),
            ((1,), np.float32),
        ],
        (2 * 128, heads, 1),
        (128, 1, 1),
        checked=False,
        function_constants=constants,
    )
    expected = mx.fast.scaled_dot_product_attention(
        *[mx.array(x)[None] for x in (q, k, v)], scale=size**-0.5, mask="causal"
    )
    np.testing.assert_allclose(out, np.array(expected)[0], rtol=1e-4, atol=1e-5)


# ---- mlx-lm


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", ["plain", "mask", "vector_gate"])
def test_gated_delta(dtype, variant):
    inputs = gated_delta_inputs(dtype, **({variant: True} if variant != "plain" else {}))
    # With a mask all threads write the zeros of a masked step: formally a race, of equal values.
    with mlx_lm_module("models.gated_delta", mode="checked", allow=["on device 'y'"]) as module:
        y, state = module.gated_delta_kernel(*inputs)
        expected_y, expected_state = module.gated_delta_ops(*inputs)
    if inputs[6] is not None:
        expected_y = expected_y * inputs[6][..., None, None]
    assert error(y, expected_y) < 2 * TOLERANCE[dtype]
    assert error(state, expected_state) < 2e-3 if dtype != mx.float32 else 2e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_ssm(dtype):
    batch, heads, size, groups, states = 2, 8, 16, 2, 64
    keys = iter(mx.random.split(mx.random.key(1), 8))

    def normal(*shape):
        return mx.random.normal(shape, key=next(keys))

    x = normal(batch, 1, heads, size).astype(dtype)
    b, c = (normal(batch, 1, groups, states).astype(dtype) for _ in range(2))
    rates, skip, bias = normal(heads), normal(heads), normal(heads)
    dt, state = normal(batch, 1, heads).astype(dtype), normal(batch, heads, size, states)
    with mlx_lm_module("models.ssm", mode="checked") as module:
        y, new_state = module.ssm_update_kernel(
            x, rates, b, c, skip, dt, bias, state, (0.001, 100.0)
        )
        expected_y, expected_state = module.ssm_attn(x, rates, b, c, skip, dt, bias, state)
    assert error(y, expected_y) < 2 * TOLERANCE[dtype]
    assert error(new_state, expected_state) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_wkv7(dtype):
    batch, length, heads, size = 1, 5, 2, 64
    keys = mx.random.split(mx.random.key(2), 7)
    r, k, v, a, b = (
        (mx.random.normal((batch, length, heads, size), key=key) / 8).astype(dtype)
        for key in keys[:5]
    )
    w = mx.random.uniform(0.5, 1, (batch, length, heads, size), key=keys[5]).astype(dtype)
    state = mx.random.normal((batch, heads, size, size), key=keys[6]).astype(dtype)
    with mlx_lm_module("models.rwkv7", mode="checked") as module:
        y, new_state = module.wkv7_kernel(r, w, k, v, a, b, state)
        expected, s = [], state.astype(mx.float32)
        for t in range(length):
            inputs = [x[:, t].astype(mx.float32) for x in (r, w, k, v, a, b)]
            step, s = module._wkv7_step_ops(*inputs, s)
            expected.append(step)
    assert error(y, mx.stack(expected, axis=1)[..., 0]) < TOLERANCE[dtype]
    assert error(new_state, s) < TOLERANCE[dtype]


def test_a_race_in_a_kernel_of_mlx_lm_is_found():
    """mlx-lm's KL divergence reads `shared` and overwrites it without a barrier."""
    q, p = (mx.random.normal((3, 200), key=mx.random.key(i)) for i in (3, 4))
    with (
        mlx_lm_module("tuner.losses", mode="checked") as module,
        pytest.raises(metal_emulator.KernelError) as raised,
    ):
        module.kl_div_loss(q, p)
    races = [f for f in raised.value.findings if "data race on threadgroup 'shared'" in f.message]
    assert "shared[simd_lane_id" in races[0].text


def test_head_norms():
    qkvg = mx.random.normal((5, 2 * (3 + 2) * 40), key=mx.random.key(5))
    with mlx_lm_module("kernels.qk_norm", mode="checked") as module:
        q, k = module.qk_norm(
            qkvg, n_heads=3, n_kv_heads=2, head_dim=40, eps=1e-6, query_scale=0.25
        )
    heads = qkvg[:, : 5 * 40].reshape(5, 5, 40)
    normed = mx.fast.rms_norm(heads, None, 1e-6)
    assert error(q, 0.25 * normed[:, :3]) < 1e-6
    assert error(k, normed[:, 3:]) < 1e-6


KERNELS = [
    ("models.gated_delta", lambda m: m.gated_delta_kernel(*gated_delta_inputs(mx.bfloat16))),
    (
        "models.gated_delta",
        lambda m: m.gated_delta_kernel(*gated_delta_inputs(mx.float32, mask=True)),
    ),
    (
        "kernels.qk_norm",
        lambda m: m.qk_norm(
            mx.zeros((1, 640)), n_heads=3, n_kv_heads=2, head_dim=64, eps=1e-6, query_scale=1.0
        ),
    ),
]


@pytest.mark.parametrize("number", range(len(KERNELS)))
def test_static_checks_accept_kernels_of_mlx_lm(number):
    name, call = KERNELS[number]
    launches = []
    with mlx_lm_module(name, record=launches) as module:
        call(module)
    report = metal_emulator.check_launch(launches[0])
    assert report.findings == ()
