"""Kernels over a chunk of a prompt, between its matrix products."""

from __future__ import annotations

import numpy as np

from mlx_rgemma.cpu.kernels.compiler import kernel
from mlx_rgemma.cpu.kernels.functions import f32, gate_coefficients, gelu, normalize, sigmoid

NORMAL, RESET, PADDING = 0, 1, 2


# RMSNorm, and the addition before it. Work items: rows.


@kernel
def rms_norm(first, last, x, scale, eps, y):
    """x, y: (rows, N); scale: (N,), the factor of the normalized row."""
    for n in range(first, last):
        normalize(x[n], scale, eps, y[n])


@kernel
def add_rms_norm(first, last, x, delta, scale, eps, acc, y):
    """acc: x + delta; all but scale (rows, N)."""
    for n in range(first, last):
        one, other, row = x[n], delta[n], acc[n]
        for d in range(row.size):
            row[d] = one[d] + other[d]
    rms_norm(first, last, acc, scale, eps, y)


# The causal convolution. Work items: tokens of all rows.


@kernel
def causal_conv1d(first, last, inputs, weight, bias, segment_pos, y):
    """inputs: (B, K - 1 + L, D); weight: (K, D); segment_pos: (B, L) int32; y: (B, L, D)."""
    taps, length = weight.shape[0], y.shape[1]
    for n in range(first, last):
        b, t = n // length, n % length
        out = y[b, t]
        out[:] = bias
        for back in range(min(taps - 1, segment_pos[b, t]) + 1):
            tap, row = weight[taps - 1 - back], inputs[b, t + taps - 1 - back]
            for d in range(out.size):
                out[d] += tap[d] * row[d]


# GELU of a gate, times its input. Work items: elements.


@kernel
def gated_gelu(first, last, gate, x, y):
    gate, x, y = gate[first:last], x[first:last], y[first:last]
    for i in range(y.size):
        y[i] = gelu(gate[i]) * x[i]


# The RG-LRU. Work items: channels.


@kernel
def _type_factors(token_type):
    """1 or 0 each: a step of the recurrence, of padding, of a new document."""
    return f32(token_type == NORMAL), f32(token_type == PADDING), f32(token_type == RESET)


@kernel
def rg_lru(first, last, x, gate_i, gate_r, bias_i, bias_r, log2_a_open, h0, token_type, h):
    """x, gates, h: (B, L, D); biases, log2_a_open: (D,); h0: (B, D); token_type: (B, L) uint8."""
    batch, length, _ = x.shape
    open_, b_i, b_r = log2_a_open[first:last], bias_i[first:last], bias_r[first:last]
    state = np.empty(last - first, np.float32)
    for b in range(batch):
        state[:] = h0[b, first:last]
        for t in range(length):
            normal, padding, reset = _type_factors(token_type[b, t])
            xs, ys = x[b, t, first:last], h[b, t, first:last]
            g_i, g_r = gate_i[b, t, first:last], gate_r[b, t, first:last]
            for d in range(last - first):
                a, multiplier = gate_coefficients(open_[d] * sigmoid(g_r[d] + b_r[d]))
                a = a * normal + padding
                multiplier = multiplier * normal + reset
                value = a * state[d] + multiplier * sigmoid(g_i[d] + b_i[d]) * xs[d]
                state[d] = value
                ys[d] = value
