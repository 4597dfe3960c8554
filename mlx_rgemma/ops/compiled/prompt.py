"""Loops over a piece of a prompt, between its matrix products."""

from __future__ import annotations

import numpy as np

from mlx_rgemma.ops.compiled.compiler import loop
from mlx_rgemma.ops.compiled.functions import decay, f32, gelu, normalize, sigmoid

NORMAL, RESET, PADDING = 0, 1, 2


# RMSNorm, and the addition before it. Units: rows.


@loop
def rms_norm(first, last, x, scale, eps, y):
    """x, y: (rows, N); scale: (N,), what a normalized row is multiplied by."""
    for n in range(first, last):
        normalize(x[n], scale, eps, y[n])


@loop
def add_rms_norm(first, last, x, delta, scale, eps, sums, y):
    """sums: x + delta; all but scale (rows, N)."""
    for n in range(first, last):
        one, other, row = x[n], delta[n], sums[n]
        for d in range(row.size):
            row[d] = one[d] + other[d]
    rms_norm(first, last, sums, scale, eps, y)


# The causal convolution. Units: tokens of all rows.


@loop
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


# GELU of a gate, times what it gates. Units: elements.


@loop
def gated_gelu(first, last, gate, x, y):
    gate, x, y = gate[first:last], x[first:last], y[first:last]
    for i in range(y.size):
        y[i] = gelu(gate[i]) * x[i]


# The RG-LRU. Units: channels.


@loop
def _kind_factors(kind):
    """1 or 0 each: a step of the recurrence, of padding, of a new document."""
    return f32(kind == NORMAL), f32(kind == PADDING), f32(kind == RESET)


@loop
def rg_lru(first, last, x, gate_i, gate_r, bias_i, bias_r, log2_a_open, h0, kind, h):
    """x, gates, h: (B, L, D); biases, log2_a_open: (D,); h0: (B, D); kind: (B, L) uint8."""
    batch, length, _ = x.shape
    open_, b_i, b_r = log2_a_open[first:last], bias_i[first:last], bias_r[first:last]
    state = np.empty(last - first, np.float32)
    for b in range(batch):
        state[:] = h0[b, first:last]
        for t in range(length):
            normal, padding, reset = _kind_factors(kind[b, t])
            xs, ys = x[b, t, first:last], h[b, t, first:last]
            g_i, g_r = gate_i[b, t, first:last], gate_r[b, t, first:last]
            for d in range(last - first):
                a, multiplier = decay(open_[d] * sigmoid(g_r[d] + b_r[d]))
                a = a * normal + padding
                multiplier = multiplier * normal + reset
                value = a * state[d] + multiplier * sigmoid(g_i[d] + b_i[d]) * xs[d]
                state[d] = value
                ys[d] = value
