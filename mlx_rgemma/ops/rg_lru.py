"""The Real-Gated Linear Recurrent Unit (Griffin, arXiv:2402.19427, section 2.4).

    r_t     = sigmoid(recurrent_gate_t)
    i_t     = sigmoid(input_gate_t)
    log a_t = -8 softplus(a_param) r_t                                       (eq. 5 and 6)
    h_t     = a_t h_{t-1} + sqrt(1 - a_t^2) i_t x_t                          (eq. 4)

At a reset ``a_t = 0`` and the multiplier of the input is 1, as DeepMind's code has it. Everything
after the gates' matrix products is float32: in bfloat16 a coefficient of 0.999 becomes 1.

Three forms: the kernels ``metal/rg_lru.metal`` and ``metal/rg_lru_backward.metal`` where `kernels`
lets them run, a loop for a prompt on a Linux CPU, and plain MLX operations around `scan_reference`.
"""

from __future__ import annotations

from functools import partial

import mlx.core as mx
import numpy as np

from mlx_rgemma.ops import kernels, loops
from mlx_rgemma.ops.exponential import LOG2_E, decay, sigmoid
from mlx_rgemma.ops.fused import custom_function
from mlx_rgemma.ops.lanes import in_halves
from mlx_rgemma.ops.scan import (
    BACKWARD_STEPS,
    FORWARD_STEPS,
    SEGMENT,
    scan_entries,
    scan_geometry,
    scan_gradients,
    scan_reference,
    scan_template,
    token_strides,
)

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
    *,
    input_gate_bias: mx.array | None = None,
    recurrent_gate_bias: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Run the RG-LRU over a sequence (Griffin, arXiv:2402.19427, eq. 4 to 6).

    Args:
        x: (B, L, D), any float.
        input_gate: (B, L, D), any float. Pre-activation of the input gate i.
        recurrent_gate: (B, L, D), any float. Pre-activation of the recurrence gate r.
        a_param: (D,), any float. Lambda.
        h0: (B, D), fp32. The state before the first step; zeros when omitted.
        reset: (1 or B, L), bool. True at the first token of each document.
        mask: (1 or B, L), bool. False on padding, where the state passes through unchanged.
        input_gate_bias, recurrent_gate_bias: (D,), any float. Added to the gates in fp32.

    Returns:
        ``(y, h_last)``: the states (B, L, D) in the dtype of `x`, and the last one (B, D) in fp32.

    Raises:
        ValueError: If the shapes do not agree.
    """
    batch, length, width = x.shape if x.ndim == 3 else (0, 0, 0)
    channels = (width,)
    _check(
        x,
        input_gate=(input_gate, x.shape),
        recurrent_gate=(recurrent_gate, x.shape),
        a_param=(a_param, channels),
        h0=(h0, (batch, width)),
        reset=(reset, (batch, length)),
        mask=(mask, (batch, length)),
        input_gate_bias=(input_gate_bias, channels),
        recurrent_gate_bias=(recurrent_gate_bias, channels),
    )
    h0 = mx.zeros((batch, width), mx.float32) if h0 is None else h0.astype(mx.float32)
    kind = step_kinds(reset, mask)
    if input_gate.dtype == recurrent_gate.dtype and FORWARD.usable(x.dtype, input_gate.dtype):
        biases = _both(input_gate_bias, recurrent_gate_bias)
        fused = _fused(x, input_gate, recurrent_gate, a_param, h0, kind, *biases)
        return fused[0], fused[1]
    h = None
    if loops.worthwhile(x):
        given = input_gate_bias, recurrent_gate_bias
        h = _by_loop(x, input_gate, recurrent_gate, a_param, h0, kind, *given)
    if h is None:
        input_gate = _biased(input_gate, input_gate_bias)
        recurrent_gate = _biased(recurrent_gate, recurrent_gate_bias)
        h = _rg_lru(x, input_gate, recurrent_gate, a_param, h0, kind)[0]
    return h.astype(x.dtype), h[:, -1]


NORMAL, RESET, PADDING = 0, 1, 2
"""What a step does: the recurrence, a new document, nothing."""

_ALL_NORMAL = mx.array([NORMAL], mx.uint8)


def step_kinds(reset: mx.array | None, mask: mx.array | None) -> mx.array:
    """The kind of each step, (1 or B, L) bool or uint8; (1,), one dimension, when all are `NORMAL`.

    True is `RESET`: without padding `reset` serves as it is.
    """
    if mask is None:
        return _ALL_NORMAL if reset is None else reset
    kind = mx.array(NORMAL, mx.uint8) if reset is None else reset.astype(mx.uint8)
    return mx.where(mask, kind, mx.array(PADDING, mx.uint8))


@custom_function
def _rg_lru(x, input_gate, recurrent_gate, a_param, h0, kind):
    """-> the states, and what the backward pass needs of the way to them, each (B, L, D) fp32."""
    log_a_at_open_gate = -C * _softplus(a_param)

    def gates(input_gate, recurrent_gate, *kinds):
        i, r = sigmoid(input_gate), sigmoid(recurrent_gate)
        a, multiplier = decay(log_a_at_open_gate * r)
        if kinds:  # products in place of selections, which cost a CPU twenty times as much
            normal, padding, reset = kinds
            a, multiplier = a * normal + padding, multiplier * normal + reset
        return i, r, a, multiplier

    kinds = _indicators(kind, x.shape, NORMAL, PADDING, RESET)
    i, r, a, multiplier = in_halves(
        gates, input_gate.astype(mx.float32), recurrent_gate.astype(mx.float32), *kinds
    )
    h = scan_reference(multiplier * i * x.astype(mx.float32), a, h0)
    return h, i, r, a, multiplier


@_rg_lru.vjp
def _rg_lru_vjp(primals, cotangents, outputs):
    x, input_gate, recurrent_gate, a_param, h0, kind = primals
    h, i, r, a, multiplier = outputs
    dv, da, dh0 = scan_gradients(a, h0, h, cotangents[0])
    log_a_at_open_gate = -C * _softplus(a_param)

    def gradients(dv, da, x, i, r, a, multiplier, *normal):
        dvi = dv * i
        dx = dvi * multiplier
        d_input_gate = dx * x * (1.0 - i)

        # a reaches the state twice: as the coefficient, and in multiplier = sqrt(1 - a^2), where
        # d multiplier / d log_a = -a^2 min(1 / multiplier, 2 * MAX_SQRT_GRADIENT).
        slope = mx.minimum(1.0 / mx.maximum(multiplier, 1e-30), 2.0 * MAX_SQRT_GRADIENT)
        d_log_a = a * (da - dvi * x * a * slope)
        for share in normal:
            d_log_a = d_log_a * share
        d_log_a_r = d_log_a * r
        return dx, d_input_gate, d_log_a_r * (1.0 - r) * log_a_at_open_gate, d_log_a_r

    normal = _indicators(kind, x.shape, NORMAL)
    dx, d_input_gate, d_recurrent_gate, d_log_a_r = in_halves(
        gradients, dv, da, x.astype(mx.float32), i, r, a, multiplier, *normal
    )
    d_softplus = -C * d_log_a_r.sum(axis=(0, 1))
    d_a_param = d_softplus * mx.sigmoid(a_param.astype(mx.float32))

    return (
        dx.astype(x.dtype),
        d_input_gate.astype(input_gate.dtype),
        d_recurrent_gate.astype(recurrent_gate.dtype),
        d_a_param.astype(a_param.dtype),
        dh0,
        mx.zeros_like(kind),
    )


def _indicators(kind: mx.array, shape: tuple[int, ...], *kinds: int) -> list[mx.array]:
    """For each of some kinds, 1 where a step is of it, else 0: (B, L, 1); none if all are alike."""
    if kind.ndim == 1:
        return []
    steps = mx.broadcast_to(kind[..., None], (*shape[:2], 1))
    return [(steps == what).astype(mx.float32) for what in kinds]


def _softplus(a_param: mx.array) -> mx.array:
    return mx.logaddexp(a_param.astype(mx.float32), 0.0)


def log2_a_at_open_gate(a_param: mx.array) -> mx.array:
    """``log2 a`` where the recurrence gate is open, r = 1: (D,) -> (D,), fp32."""
    return -C * LOG2_E * _softplus(a_param)


def _biased(gate: mx.array, bias: mx.array | None) -> mx.array:
    return gate if bias is None else gate.astype(mx.float32) + bias.astype(mx.float32)


def _check(x: mx.array, **expected: tuple[mx.array | None, tuple[int, ...]]) -> None:
    if x.ndim != 3 or x.shape[1] == 0:
        raise ValueError(f"[rg_lru] x must be (B, L, D) with L > 0, not {x.shape}.")
    for name, (array, shape) in expected.items():
        allowed = [shape, (1, *shape[1:])] if name in ("reset", "mask") else [shape]
        if array is not None and array.shape not in allowed:
            raise ValueError(f"[rg_lru] {name} has shape {array.shape}, expected {shape}.")


def _by_loop(x, input_gate, recurrent_gate, a_param, h0, kind, *biases):
    """The states, (B, L, D) fp32, without a gradient; None where arrays have no values."""
    given = [mx.zeros(a_param.shape) if bias is None else bias for bias in biases]
    kinds = mx.broadcast_to(kind.astype(mx.uint8), x.shape[:2])
    ready = loops.ready(
        x, input_gate, recurrent_gate, *given, log2_a_at_open_gate(a_param), h0, kinds
    )
    if ready is None:
        return None
    h = np.empty(x.shape, np.float32)
    loops.run("rg_lru", x.shape[2], *ready, h)
    return mx.array(h)


# The fused form.

_NO_BIAS = mx.array([0.0])


def _both(one: mx.array | None, other: mx.array | None) -> tuple[mx.array, mx.array]:
    """The gates' biases for the kernel, which has one way for both: (1,) where there are none."""
    given = one if one is not None else other
    absent = _NO_BIAS if given is None else mx.zeros_like(given)
    return absent if one is None else one, absent if other is None else other


@custom_function
def _fused(x, input_gate, recurrent_gate, a_param, h0, kind, bias_i, bias_r):
    return tuple(FORWARD.launch(x, input_gate, recurrent_gate, a_param, h0, kind, bias_i, bias_r))


@_fused.vjp
def _fused_vjp(primals, cotangents, outputs):
    x, input_gate, recurrent_gate, a_param, _, kind, bias_i, bias_r = primals
    dy, dh_last, _ = cotangents
    usable = BACKWARD.usable(x.dtype, input_gate.dtype)
    gradients = (BACKWARD.launch if usable else _reference_backward)(
        x, input_gate, recurrent_gate, a_param, kind, bias_i, bias_r, outputs[2], dy, dh_last
    )
    dx, d_input_gate, d_recurrent_gate, dh0, d_a_param, d_bias_i, d_bias_r = gradients
    return (
        dx,
        d_input_gate,
        d_recurrent_gate,
        d_a_param.astype(a_param.dtype),
        dh0,
        mx.zeros_like(kind),
        d_bias_i.astype(bias_i.dtype) if bias_i.shape == a_param.shape else mx.zeros_like(bias_i),
        d_bias_r.astype(bias_r.dtype) if bias_r.shape == a_param.shape else mx.zeros_like(bias_r),
    )


def _dims(x: mx.array, kind: mx.array, bias: mx.array) -> mx.array:
    _, length, width = x.shape
    bias_step = int(bias.shape == (width,))
    return mx.array([length, width, *token_strides(kind), bias_step], mx.int32)


def _launch(x, input_gate, recurrent_gate, a_param, h0, kind, bias_i, bias_r):
    batch, length, width = x.shape
    entries = (batch, kernels.ceil_div(length, SEGMENT), width)
    return FORWARD.run(
        [
            *(x, input_gate, recurrent_gate, a_param, h0, kind),
            *(bias_i, bias_r, _dims(x, kind, bias_i)),
        ],
        [(x.shape, x.dtype), (h0.shape, mx.float32), (entries, mx.float32)],
        **scan_geometry(batch, length, width, FORWARD_STEPS),
        template={"T": x.dtype, **scan_template(FORWARD_STEPS)},
    )


def _launch_backward(
    x, input_gate, recurrent_gate, a_param, kind, bias_i, bias_r, entry, dy, dh_last
):
    batch, length, width = x.shape
    dx, d_input_gate, d_recurrent_gate, dh0, d_channels = BACKWARD.run(
        [
            *(x, input_gate, recurrent_gate, a_param, kind, bias_i, bias_r),
            *(entry, dy, dh_last, _dims(x, kind, bias_i)),
        ],
        [
            (x.shape, x.dtype),
            (input_gate.shape, input_gate.dtype),
            (recurrent_gate.shape, recurrent_gate.dtype),
            (dh_last.shape, mx.float32),
            ((batch, 3, width), mx.float32),
        ],
        **scan_geometry(batch, length, width, BACKWARD_STEPS),
        template={"T": x.dtype, "G": input_gate.dtype, **scan_template(BACKWARD_STEPS)},
    )
    d_a_param, d_bias_i, d_bias_r = d_channels.sum(axis=0)
    return dx, d_input_gate, d_recurrent_gate, dh0, d_a_param, d_bias_i, d_bias_r


def _reference(x, input_gate, recurrent_gate, a_param, h0, kind, bias_i, bias_r):
    gates = _biased(input_gate, bias_i), _biased(recurrent_gate, bias_r)
    h = _rg_lru(x, *gates, a_param, h0, kind)[0]
    return h.astype(x.dtype), h[:, -1], scan_entries(h0, h)


def _reference_backward(
    x, input_gate, recurrent_gate, a_param, kind, bias_i, bias_r, entry, dy, dh_last
):
    def states(x, input_gate, recurrent_gate, h0, *parameters):
        return _reference(x, input_gate, recurrent_gate, parameters[0], h0, kind, *parameters[1:])[
            :2
        ]

    # The kernel's gradients of parameters are fp32: those of the arrays given are cast later.
    parameters = [z.astype(mx.float32) for z in (a_param, bias_i, bias_r)]
    primals = [x, input_gate, recurrent_gate, entry[:, 0], *parameters]
    return mx.vjp(states, primals, [dy, dh_last])[1]


_TINY = (2, 150, 35)
"""More than one tile, and neither length nor width a whole number of anything."""
_MODEL = (1, 2048, 2560)


def _example(
    x_dtype: mx.Dtype, gate_dtype: mx.Dtype, shape: tuple[int, int, int] = _TINY
) -> tuple[mx.array, ...]:
    batch, length, width = shape
    kind = (mx.arange(batch * length).reshape(batch, length) % 70 == 69).astype(mx.uint8)
    padded = mx.arange(length) >= length - 10 * mx.arange(batch)[:, None]
    # From a memory without end (a = 1) over thousands of tokens to a few.
    a_param = mx.where(mx.arange(width) == 0, -40.0, mx.arange(width) % 16 - 11.0)
    return (
        kernels.sample(shape, x_dtype, 0),
        kernels.sample(shape, gate_dtype, 1),
        kernels.sample(shape, gate_dtype, 2) - 2,
        a_param.astype(x_dtype),
        kernels.sample((batch, width), mx.float32, 4),
        mx.where(padded, mx.array(PADDING, mx.uint8), kind),
        kernels.sample((width,), x_dtype, 5),
        kernels.sample((width,), x_dtype, 6),
    )


def _example_backward(
    x_dtype: mx.Dtype, gate_dtype: mx.Dtype, shape: tuple[int, int, int] = _TINY
) -> tuple[mx.array, ...]:
    arguments = _example(x_dtype, gate_dtype, shape)
    x, input_gate, recurrent_gate, a_param, h0, kind, bias_i, bias_r = arguments
    entry = _reference(*arguments)[2]
    dy = kernels.sample(x.shape, x_dtype, 7)
    dh_last = kernels.sample(h0.shape, mx.float32, 8)
    return x, input_gate, recurrent_gate, a_param, kind, bias_i, bias_r, entry, dy, dh_last


_INPUTS = ("x", "input_gate", "recurrent_gate", "a_param")
_BIASES = ("input_gate_bias", "recurrent_gate_bias")
_GRADIENTS = ("dx", "d_input_gate", "d_recurrent_gate", "dh0")
FORWARD = kernels.register(
    "rg_lru",
    inputs=(*_INPUTS, "h0", "kind", *_BIASES, "dims"),
    outputs=("y", "h_last", "entry"),
    launch=_launch,
    reference=_reference,
    example=_example,
    workload=partial(_example, shape=_MODEL),
    variants=[(dtype, dtype) for dtype in kernels.FLOATS],
)
BACKWARD = kernels.register(
    "rg_lru_backward",
    inputs=(*_INPUTS, "kind", *_BIASES, "entry", "dy", "dh_last", "dims"),
    outputs=(*_GRADIENTS, "d_channels"),
    results=(*_GRADIENTS, "d_a_param", "d_input_gate_bias", "d_recurrent_gate_bias"),
    launch=_launch_backward,
    reference=_reference_backward,
    example=_example_backward,
    workload=partial(_example_backward, shape=_MODEL),
    variants=[(dtype, dtype) for dtype in kernels.FLOATS],
)
