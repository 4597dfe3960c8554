"""Each operation against float64 evaluations and Google's code, forward and backward."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from conftest import golden, max_error, relative_error, tolerance

from mlx_rgemma import ops

# Relative to the largest value; the references are float64, or within 1e-7 of it.
SCAN_RTOL = CONV_RTOL = ATTENTION_RTOL = tolerance(2e-6)
RG_LRU_RTOL, RG_LRU_GRADIENT_RTOL = tolerance(5e-6), tolerance(2e-5)
# In case `offset`, the reference's own float32 angles at position 5,000 limit the rotation.
ATTENTION_OFFSET_RTOL = tolerance(2e-4)


def cases(name: str) -> dict[str, dict[str, np.ndarray]]:
    found: dict[str, dict[str, np.ndarray]] = {}
    for key, array in golden(f"ops/{name}.npz").items():
        case, _, field = key.partition("/")
        found.setdefault(case, {})[field] = array
    return found


def arrays(case: dict[str, np.ndarray], *names: str) -> list[mx.array]:
    return [mx.array(case[name].astype(np.float32)) for name in names]


@pytest.mark.parametrize("name", cases("linear_scan"))
def test_linear_scan(name):
    case = cases("linear_scan")[name]
    x, a, h0, gy, gh_last = arrays(case, "x", "a", "h0", "gy", "gh_last")
    reset = mx.array(case["reset"]).astype(mx.bool_)

    def loss(x, a, h0):
        y, h_last = ops.linear_scan(x, a, h0, reset)
        return (y * gy).sum() + (h_last * gh_last).sum()

    y, h_last = ops.linear_scan(x, a, h0, reset)
    gradients = mx.grad(loss, argnums=(0, 1, 2))(x, a, h0)
    for field, value in zip(
        ("y", "h_last", "gx", "ga", "gh0"), (y, h_last, *gradients), strict=True
    ):
        assert relative_error(value, case[field]) < SCAN_RTOL, field


def gate(u, weight, bias):
    batch, length, width = u.shape
    heads = u.reshape(batch, length, weight.shape[0], -1).swapaxes(1, 2)
    return (heads @ weight).swapaxes(1, 2).reshape(batch, length, width) + bias.reshape(width)


RG_LRU_INPUTS = (
    "u",
    "input_gate_weight",
    "input_gate_bias",
    "recurrent_gate_weight",
    "recurrent_gate_bias",
    "recurrent_param",
    "h0",
)


@pytest.mark.parametrize("name", cases("rglru"))
def test_rg_lru(name):
    case = cases("rglru")[name]
    reset = mx.array(case["segment_pos"]) == 0
    gy, gh_last = arrays(case, "gy", "gh_last")

    def layer(u, iw, ib, rw, rb, a_param, h0):
        return ops.rg_lru(u, gate(u, iw, ib), gate(u, rw, rb), a_param, h0, reset)

    def loss(*inputs):
        y, h_last = layer(*inputs)
        return (y * gy).sum() + (h_last * gh_last).sum()

    inputs = arrays(case, *RG_LRU_INPUTS)
    y, h_last = layer(*inputs)
    assert relative_error(y, case["y"]) < RG_LRU_RTOL
    assert relative_error(h_last, case["h_last"]) < RG_LRU_RTOL
    gradients = mx.grad(loss, argnums=tuple(range(7)))(*inputs)
    for field, gradient in zip(RG_LRU_INPUTS, gradients, strict=True):
        assert mx.isfinite(gradient).all(), field
        assert relative_error(gradient, case[f"grad_{field}"]) < RG_LRU_GRADIENT_RTOL, field


@pytest.mark.parametrize("name", cases("conv1d"))
def test_causal_conv1d(name):
    case = cases("conv1d")[name]
    x, weight_hf, bias, state = arrays(case, "x", "weight_hf", "bias", "state")
    positions = mx.array(case["segment_pos"])
    weight = weight_hf.swapaxes(1, 2)
    y, new_state = ops.causal_conv1d(x, weight, bias, state, segment_pos=positions)
    assert relative_error(y, case["y"]) < CONV_RTOL
    assert relative_error(new_state, case["new_state"]) < CONV_RTOL
    pieces, state_so_far = [], state
    for t in range(x.shape[1]):
        piece, state_so_far = ops.causal_conv1d(
            x[:, t : t + 1], weight, bias, state_so_far, segment_pos=positions[:, t : t + 1]
        )
        pieces.append(piece)
    assert relative_error(mx.concatenate(pieces, axis=1), case["y"]) < CONV_RTOL
    assert relative_error(state_so_far, case["new_state"]) < CONV_RTOL


@pytest.mark.parametrize("name", cases("attention"))
@pytest.mark.parametrize("rule", ["window_plus_1", "window"])
def test_windowed_attention(name, rule):
    case = cases("attention")[name]
    expected = case.get(f"out_keys_{rule}")
    if expected is None:
        expected = case["out_keys_window_plus_1"]
        rule = "window_plus_1"
    tolerance = ATTENTION_OFFSET_RTOL if name == "offset" else ATTENTION_RTOL
    window = int(case["window"]) - (rule == "window")
    q, k, v = (z.swapaxes(1, 2) for z in arrays(case, "q", "k", "v"))
    positions = mx.array(case.get("positions", case.get("segment_pos")))
    frequencies = ops.rotary_frequencies(q.shape[-1] // 2, 10000.0)
    cos, sin = ops.rotary_angles(positions, frequencies)
    q, k = ops.apply_rotary(q, cos, sin), ops.apply_rotary(k, cos, sin)
    if "q_rope" in case:
        assert relative_error(q.swapaxes(1, 2), case["q_rope"]) < tolerance
        assert relative_error(k.swapaxes(1, 2), case["k_rope"]) < tolerance
    reach = mx.minimum(positions, window) if "segment_pos" in case else None
    out = ops.windowed_attention(q, k, v, window=window, reach=reach)
    assert relative_error(out.swapaxes(1, 2), expected) < tolerance


def test_rotary_is_exact_far_out():
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


def test_rotary_leaves_the_rest_of_the_head_alone():
    x = mx.random.normal((1, 2, 3, 20))
    cos, sin = ops.rotary_angles(mx.array([[4, 5, 6]]), ops.rotary_frequencies(10, 10000.0))
    assert mx.array_equal(ops.apply_rotary(x, cos, sin)[..., 10:], x[..., 10:])
