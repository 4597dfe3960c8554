"""The recurrences and the convolution in float64 NumPy, one step after the other, with gradients.

Written from the equations of the operations' docstrings, apart from the code under test.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

Array = np.ndarray[Any, Any]

NORMAL, RESET, PADDING = 0, 1, 2
MAX_SQRT_GRADIENT = 1000.0


def to64(x: mx.array) -> Array:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def scan(x: Array, a: Array, h0: Array, dy: Array, dh_last: Array) -> dict[str, Array]:
    """h_t = a_t h_{t-1} + x_t, and the gradients of sum(y dy) + sum(h_last dh_last)."""
    y = np.zeros_like(x)
    h = h0
    for t in range(x.shape[1]):
        h = a[:, t] * h + x[:, t]
        y[:, t] = h
    dx, da = np.zeros_like(x), np.zeros_like(x)
    dh = dh_last
    for t in range(x.shape[1] - 1, -1, -1):
        dh = dh + dy[:, t]
        dx[:, t] = dh
        da[:, t] = dh * (y[:, t - 1] if t > 0 else h0)
        dh = a[:, t] * dh
    return {"y": y, "h_last": h, "dx": dx, "da": da, "dh0": dh}


def sigmoid(x: Array) -> Array:
    return np.where(x >= 0, 1.0, np.exp(-np.abs(x))) / (1.0 + np.exp(-np.abs(x)))


def rg_lru(
    x: Array,
    input_gate: Array,
    recurrent_gate: Array,
    a_param: Array,
    h0: Array,
    token_type: Array,
    bias_i: Array,
    bias_r: Array,
    dy: Array,
    dh_last: Array,
) -> dict[str, Array]:
    """The RG-LRU with its types of steps (B, L), and every gradient."""
    token_type = token_type[..., None]
    i, r = sigmoid(input_gate + bias_i), sigmoid(recurrent_gate + bias_r)
    softplus = np.logaddexp(a_param, 0.0)
    log_a = -8.0 * softplus * r
    square = -np.expm1(2.0 * log_a)
    a = np.where(token_type == NORMAL, np.exp(log_a), token_type == PADDING)
    m = np.where(token_type == NORMAL, np.sqrt(square), token_type == RESET)
    found = scan(m * i * x, a, h0, dy, dh_last)
    dv, da = found["dx"], found["da"]
    with np.errstate(divide="ignore"):
        d_sqrt = np.minimum(0.5 / np.sqrt(square), MAX_SQRT_GRADIENT)
    d_log_a = np.where(
        token_type == NORMAL, da * a + dv * i * x * d_sqrt * -2.0 * np.exp(2.0 * log_a), 0.0
    )
    d_input_gate = dv * m * x * i * (1.0 - i)
    d_recurrent_gate = d_log_a * -8.0 * softplus * r * (1.0 - r)
    return {
        "y": found["y"],
        "h_last": found["h_last"],
        "dx": dv * m * i,
        "d_input_gate": d_input_gate,
        "d_recurrent_gate": d_recurrent_gate,
        "d_a_param": -8.0 * sigmoid(a_param) * (d_log_a * r).sum(axis=(0, 1)),
        "dh0": found["dh0"],
        "d_bias_i": d_input_gate.sum(axis=(0, 1)),
        "d_bias_r": d_recurrent_gate.sum(axis=(0, 1)),
    }


def conv(
    x: Array,
    weight: Array,
    bias: Array,
    state: Array,
    segment_pos: Array,
    lengths: Array,
    dy: Array,
    d_new_state: Array,
) -> dict[str, Array]:
    """The causal convolution; weight (D, K, 1), segment_pos (B, L), lengths (B,)."""
    batch, length, _ = x.shape
    taps = weight.shape[1]
    inputs = np.concatenate([state, x], axis=1)
    d_inputs, d_weight = np.zeros_like(inputs), np.zeros_like(weight)
    y = np.zeros_like(x) + bias
    for b in range(batch):
        for t in range(length):
            for j in range(min(taps - 1, segment_pos[b, t]) + 1):
                source = t + taps - 1 - j
                y[b, t] += weight[:, taps - 1 - j, 0] * inputs[b, source]
                d_inputs[b, source] += weight[:, taps - 1 - j, 0] * dy[b, t]
                d_weight[:, taps - 1 - j, 0] += dy[b, t] * inputs[b, source]
    new_state = np.zeros_like(state)
    for b in range(batch):
        for k in range(taps - 1):
            age = taps - 2 - k  # tokens before the last one
            if lengths[b] == 0 or segment_pos[b, lengths[b] - 1] >= age:
                new_state[b, k] = inputs[b, lengths[b] + k]
                d_inputs[b, lengths[b] + k] += d_new_state[b, k]
    return {
        "y": y,
        "new_state": new_state,
        "dx": d_inputs[:, taps - 1 :],
        "dweight": d_weight,
        "dbias": dy.sum(axis=(0, 1)),
        "dstate": d_inputs[:, : taps - 1],
    }
