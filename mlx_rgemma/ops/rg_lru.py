"""The Real-Gated Linear Recurrent Unit (Griffin, arXiv:2402.19427, section 2.4).

    r_t     = sigmoid(recurrent_gate_t)
    i_t     = sigmoid(input_gate_t)
    log a_t = -8 softplus(a_param) r_t                                       (eq. 5 and 6)
    h_t     = a_t h_{t-1} + sqrt(1 - a_t^2) i_t x_t                          (eq. 4)

At a reset ``a_t = 0`` and the multiplier of the input is 1, as DeepMind's code has it. Everything
after the gates' matrix products is float32: in bfloat16 a coefficient of 0.999 becomes 1.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_rgemma.ops.scan import scan_gradients, scan_reference

C = 8.0
"""The paper's constant c."""

MAX_SQRT_GRADIENT = 1000.0
"""Bound of d sqrt(z) / dz, as in DeepMind's code: without it a = 1 gives NaN gradients."""


def rg_lru(
    x: mx.array,
    input_gate: mx.array,
    recurrent_gate: mx.array,
    a_param: mx.array,
    h0: mx.array | None = None,
    reset: mx.array | None = None,
    mask: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Run the RG-LRU over a sequence (Griffin, arXiv:2402.19427, eq. 4 to 6).

    Args:
        x: (B, L, D), any float.
        input_gate: (B, L, D), any float. Pre-activation of the input gate i.
        recurrent_gate: (B, L, D), any float. Pre-activation of the recurrence gate r.
        a_param: (D,), any float. Lambda.
        h0: (B, D), fp32. The state before the first step; zeros when omitted.
        reset: (B, L), bool. True at the first token of each document.
        mask: (B, L), bool. False on padding, where the state passes through unchanged.

    Returns:
        ``(y, h_last)``: the states (B, L, D) in the dtype of `x`, and the last one (B, D) in fp32.

    Raises:
        ValueError: If the shapes do not agree.
    """
    _check(x, input_gate, recurrent_gate, a_param, h0, reset, mask)
    batch, length, width = x.shape
    if h0 is None:
        h0 = mx.zeros((batch, width), mx.float32)
    kind = step_kinds(batch, length, reset, mask)
    h = _rg_lru(x, input_gate, recurrent_gate, a_param, h0.astype(mx.float32), kind)
    return h.astype(x.dtype), h[:, -1]


NORMAL, RESET, PADDING = 0, 1, 2
"""What a step does: the recurrence, a new document, nothing."""


def step_kinds(batch: int, length: int, reset: mx.array | None, mask: mx.array | None) -> mx.array:
    """One byte a step: (B, L) uint8, or (1,), one dimension, when all steps are `NORMAL`."""
    if reset is None and mask is None:
        return mx.zeros((1,), mx.uint8)
    kind = mx.zeros((batch, length), mx.uint8) if reset is None else reset.astype(mx.uint8)
    return kind if mask is None else mx.where(mask, kind, mx.array(PADDING, mx.uint8))


@mx.custom_function
def _rg_lru(x, input_gate, recurrent_gate, a_param, h0, kind):
    a, i, multiplier = _coefficients(input_gate, recurrent_gate, a_param, kind)
    return scan_reference(multiplier * i * x.astype(mx.float32), a, h0)


@_rg_lru.vjp
def _rg_lru_vjp(primals, cotangent, h):
    x, input_gate, recurrent_gate, a_param, h0, kind = primals
    a, i, multiplier = _coefficients(input_gate, recurrent_gate, a_param, kind)
    x32 = x.astype(mx.float32)
    dv, da, dh0 = scan_gradients(a, h0, h, cotangent)

    dx = dv * multiplier * i
    d_input_gate = dv * multiplier * x32 * i * (1.0 - i)

    # a reaches the state twice: as the coefficient, and in multiplier = sqrt(1 - a^2), where
    # d multiplier / d log_a = -a^2 min(1 / multiplier, 2 * MAX_SQRT_GRADIENT).
    slope = mx.minimum(1.0 / mx.maximum(multiplier, 1e-30), 2.0 * MAX_SQRT_GRADIENT)
    d_log_a = da * a - dv * i * x32 * mx.square(a) * slope
    if kind.ndim == 2:
        d_log_a = mx.where(kind[..., None] == NORMAL, d_log_a, 0.0)
    r = mx.sigmoid(recurrent_gate.astype(mx.float32))
    scale = -C * _softplus(a_param)
    d_recurrent_gate = d_log_a * scale * r * (1.0 - r)
    d_softplus = -C * (d_log_a * r).sum(axis=(0, 1))
    d_a_param = d_softplus * mx.sigmoid(a_param.astype(mx.float32))

    return (
        dx.astype(x.dtype),
        d_input_gate.astype(input_gate.dtype),
        d_recurrent_gate.astype(recurrent_gate.dtype),
        d_a_param.astype(a_param.dtype),
        dh0,
        mx.zeros_like(kind),
    )


def _coefficients(input_gate, recurrent_gate, a_param, kind):
    """-> a, i and the multiplier sqrt(1 - a^2), each (B, L, D) fp32."""
    i = mx.sigmoid(input_gate.astype(mx.float32))
    r = mx.sigmoid(recurrent_gate.astype(mx.float32))
    log_a = (-C * _softplus(a_param)) * r
    a = mx.exp(log_a)
    multiplier = mx.sqrt(-mx.expm1(2.0 * log_a))
    if kind.ndim == 2:
        kind = kind[..., None]
        a = mx.where(kind == NORMAL, a, (kind == PADDING).astype(mx.float32))
        multiplier = mx.where(kind == NORMAL, multiplier, (kind == RESET).astype(mx.float32))
    return a, i, multiplier


def _softplus(a_param: mx.array) -> mx.array:
    return mx.logaddexp(a_param.astype(mx.float32), 0.0)


def _check(x, input_gate, recurrent_gate, a_param, h0, reset, mask) -> None:
    if x.ndim != 3 or x.shape[1] == 0:
        raise ValueError(f"[rg_lru] x must be (B, L, D) with L > 0, not {x.shape}.")
    batch, length, width = x.shape
    for name, array, shape in (
        ("input_gate", input_gate, x.shape),
        ("recurrent_gate", recurrent_gate, x.shape),
        ("a_param", a_param, (width,)),
        ("h0", h0, (batch, width)),
        ("reset", reset, (batch, length)),
        ("mask", mask, (batch, length)),
    ):
        if array is not None and array.shape != shape:
            raise ValueError(f"[rg_lru] {name} has shape {array.shape}, expected {shape}.")
