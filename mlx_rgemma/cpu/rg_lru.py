"""The RG-LRU: a Numba kernel for a prompt, and for training MLX operations with fast exponentials.

See `mlx_rgemma.ops.rg_lru` for the equations.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlx_rgemma.cpu import numba_runtime
from mlx_rgemma.cpu.arrays import empty, materialize
from mlx_rgemma.cpu.eager import eager
from mlx_rgemma.cpu.fastmath import LOG2_E, gate_coefficients, sigmoid
from mlx_rgemma.cpu.streams import split_across_streams
from mlx_rgemma.ops.backend import Backend
from mlx_rgemma.ops.rg_lru import MAX_SQRT_GRADIENT, RG_LRU, C, TokenType, biased, log_a_base
from mlx_rgemma.ops.scan import linear_scan, scan_gradients


@RG_LRU.implementation(Backend.CPU, supports=numba_runtime.is_long, gradient="none")
def rg_lru(
    x: mx.array,
    input_gate: mx.array,
    recurrent_gate: mx.array,
    a_param: mx.array,
    h0: mx.array,
    token_type: mx.array,
    *biases: mx.array | None,
) -> Any:
    given = [mx.zeros(a_param.shape) if bias is None else bias for bias in biases]
    types = mx.broadcast_to(token_type.astype(mx.uint8), x.shape[:2])
    log2_a_base = log_a_base(a_param) * LOG2_E
    views = materialize(x, input_gate, recurrent_gate, *given, log2_a_base, h0, types)
    if views is None:
        return NotImplemented
    h, out = empty(x.shape)
    numba_runtime.run("rg_lru", x.shape[2], *views, out)
    return h.astype(x.dtype), h[:, -1]


@RG_LRU.implementation(Backend.CPU, gradient="own")
def differentiable_rg_lru(
    x: mx.array,
    input_gate: mx.array,
    recurrent_gate: mx.array,
    a_param: mx.array,
    h0: mx.array,
    token_type: mx.array,
    bias_i: mx.array | None = None,
    bias_r: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    gates = biased(input_gate, bias_i), biased(recurrent_gate, bias_r)
    h = _states(x, *gates, a_param, h0, token_type)[0]
    return h.astype(x.dtype), h[:, -1]


def _states_gradient(primals, cotangents, outputs):
    x, _, _, a_param, h0, token_type = primals
    h, i, r, a, multiplier = outputs
    dv, da, dh0 = scan_gradients(a, h0, h, cotangents[0])
    base = log_a_base(a_param)

    def gradients(dv, da, x, i, r, a, multiplier, *normal):
        dvi = dv * i
        dx = dvi * multiplier
        d_input_gate = dx * x * (1.0 - i)

        # a reaches the state twice: as the coefficient, and in multiplier = sqrt(1 - a^2), where
        # d multiplier / d log_a = -a^2 min(1 / multiplier, 2 * MAX_SQRT_GRADIENT).
        slope = mx.minimum(1.0 / mx.maximum(multiplier, 1e-30), 2.0 * MAX_SQRT_GRADIENT)
        d_log_a = a * (da - dvi * x * a * slope)
        for indicator in normal:
            d_log_a = d_log_a * indicator
        d_log_a_r = d_log_a * r
        return dx, d_input_gate, d_log_a_r * (1.0 - r) * base, d_log_a_r

    normal = _indicators(token_type, x.shape, TokenType.NORMAL)
    dx, d_input_gate, d_recurrent_gate, d_log_a_r = split_across_streams(
        gradients, dv, da, x.astype(mx.float32), i, r, a, multiplier, *normal
    )
    d_softplus = -C * d_log_a_r.sum(axis=(0, 1))
    d_a_param = d_softplus * mx.sigmoid(a_param.astype(mx.float32))
    return (
        dx.astype(x.dtype),
        d_input_gate,
        d_recurrent_gate,
        d_a_param.astype(a_param.dtype),
        dh0,
        mx.zeros_like(token_type),
    )


@eager(_states_gradient)
def _states(x, input_gate, recurrent_gate, a_param, h0, token_type):
    """-> the states, and what the backward pass needs beside them, each (B, L, D) fp32."""
    base = log_a_base(a_param)

    def gates(input_gate, recurrent_gate, *types):
        i, r = sigmoid(input_gate), sigmoid(recurrent_gate)
        a, multiplier = gate_coefficients(base * r)
        if types:  # multiplications instead of `where`, which takes twenty times as long
            normal, padding, reset = types
            a, multiplier = a * normal + padding, multiplier * normal + reset
        return i, r, a, multiplier

    types = _indicators(token_type, x.shape, TokenType.NORMAL, TokenType.PADDING, TokenType.RESET)
    i, r, a, multiplier = split_across_streams(gates, input_gate, recurrent_gate, *types)
    h = linear_scan(multiplier * i * x.astype(mx.float32), a, h0)
    return h, i, r, a, multiplier


def _indicators(token_type: mx.array, shape: tuple[int, ...], *types: int) -> list[mx.array]:
    """Return, per type, 1 where a token is of it, else 0: (B, L, 1); none if all are alike."""
    if token_type.ndim == 1:
        return []
    tokens = mx.broadcast_to(token_type[..., None], (*shape[:2], 1))
    return [(tokens == what).astype(mx.float32) for what in types]
