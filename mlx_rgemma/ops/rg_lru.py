"""The Real-Gated Linear Recurrent Unit (Griffin, arXiv:2402.19427, section 2.4).

    r_t     = sigmoid(recurrent_gate_t)
    i_t     = sigmoid(input_gate_t)
    log a_t = -8 softplus(a_param) r_t                                       (eq. 5 and 6)
    h_t     = a_t h_{t-1} + sqrt(1 - a_t^2) i_t x_t                          (eq. 4)

At a reset ``a_t = 0`` and the multiplier of the input is 1, as in DeepMind's code. Everything after
the gates' matrix products is float32: in bfloat16 a coefficient of 0.999 becomes 1.

Kernels: ``metal/rg_lru.metal`` and ``metal/rg_lru_backward.metal``.
"""

from __future__ import annotations

from enum import IntEnum
from functools import partial
from typing import Any

import mlx.core as mx

from mlx_rgemma.ops import metal
from mlx_rgemma.ops.autograd import custom_function
from mlx_rgemma.ops.backend import Backend, Operation
from mlx_rgemma.ops.metal import SIMD, MetalKernel, ceil_div, sample, token_strides
from mlx_rgemma.ops.scan import linear_scan

C = 8.0
"""The paper's constant c."""

MAX_SQRT_GRADIENT = 1000.0
"""Bound of d sqrt(z) / dz, as in DeepMind's code: without it a = 1 gives NaN gradients."""


class TokenType(IntEnum):
    """The effect of a token on the state: the recurrence, a new document's start, or none."""

    NORMAL = 0
    RESET = 1
    PADDING = 2


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
    biases = input_gate_bias, recurrent_gate_bias
    y, h_last = RG_LRU(
        x, input_gate, recurrent_gate, a_param, h0, token_types(reset, mask), *biases
    )
    return y, h_last


def token_types(reset: mx.array | None, mask: mx.array | None) -> mx.array:
    """Return each token's `TokenType`, (1 or B, L) uint8; (1,), one value, when all are normal.

    True is `RESET`: without padding `reset` serves as it is.
    """
    if mask is None:
        return ALL_NORMAL if reset is None else reset
    types = mx.array(TokenType.NORMAL, mx.uint8) if reset is None else reset.astype(mx.uint8)
    return mx.where(mask, types, mx.array(TokenType.PADDING, mx.uint8))


ALL_NORMAL = mx.array([TokenType.NORMAL], mx.uint8)


def reference(
    x: mx.array,
    input_gate: mx.array,
    recurrent_gate: mx.array,
    a_param: mx.array,
    h0: mx.array,
    token_type: mx.array,
    input_gate_bias: mx.array | None = None,
    recurrent_gate_bias: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """The equations above in plain MLX; arguments as `rg_lru`, with `token_types`."""
    h = _states(
        x, input_gate, recurrent_gate, a_param, h0, token_type, input_gate_bias, recurrent_gate_bias
    )
    return h.astype(x.dtype), h[:, -1]


def _states(
    x: mx.array,
    input_gate: mx.array,
    recurrent_gate: mx.array,
    a_param: mx.array,
    h0: mx.array,
    token_type: mx.array,
    bias_i: mx.array | None,
    bias_r: mx.array | None,
) -> Any:
    i = mx.sigmoid(biased(input_gate, bias_i))
    r = mx.sigmoid(biased(recurrent_gate, bias_r))
    log_a = log_a_base(a_param) * r
    a = mx.exp(log_a)
    multiplier = bounded_sqrt(-mx.expm1(2.0 * log_a))  # 1 - a^2, without cancellation near a = 1
    if token_type.ndim > 1:
        reset = (token_type == TokenType.RESET)[..., None]
        padding = (token_type == TokenType.PADDING)[..., None]
        a = mx.where(padding, 1.0, mx.where(reset, 0.0, a))
        multiplier = mx.where(padding, 0.0, mx.where(reset, 1.0, multiplier))
    return linear_scan(multiplier * i * x.astype(mx.float32), a, h0)


@custom_function
def bounded_sqrt(z: mx.array) -> mx.array:
    """Return the square root, with a derivative of at most `MAX_SQRT_GRADIENT`."""
    return mx.sqrt(z)


@bounded_sqrt.vjp
def _bounded_sqrt_vjp(_z: Any, cotangent: Any, root: Any) -> Any:
    return cotangent * mx.minimum(0.5 / mx.maximum(root, 1e-30), MAX_SQRT_GRADIENT)


def log_a_base(a_param: mx.array) -> mx.array:
    """Return ``-c softplus(Lambda)``, log a where the recurrence gate is open: (D,), fp32."""
    return -C * mx.logaddexp(a_param.astype(mx.float32), 0.0)


def biased(gate: mx.array, bias: mx.array | None) -> mx.array:
    """Return a gate's pre-activation in fp32, with its bias."""
    gate = gate.astype(mx.float32)
    return gate if bias is None else gate + bias.astype(mx.float32)


RG_LRU = Operation(reference)


def _check(x: mx.array, **expected: tuple[mx.array | None, tuple[int, ...]]) -> None:
    if x.ndim != 3 or x.shape[1] == 0:
        raise ValueError(f"[rg_lru] x must be (B, L, D) with L > 0, not {x.shape}.")
    for name, (array, shape) in expected.items():
        allowed = [shape, (1, *shape[1:])] if name in ("reset", "mask") else [shape]
        if array is not None and array.shape not in allowed:
            raise ValueError(f"[rg_lru] {name} has shape {array.shape}, expected {shape}.")


# The Metal kernels. The backward pass starts from the state before each `CHUNK` steps, which the
# forward pass leaves behind, and so keeps the inputs alone.

CHUNK = 32
FORWARD_STEPS, BACKWARD_STEPS = 8, 4
SPLITS = 8
"""Simdgroups of a threadgroup, at most; each takes that many steps in registers at a time.
``SPLITS * BACKWARD_STEPS == CHUNK``: a backward tile begins where the forward pass left a state.
At 256 threads the 80 threadgroups of the 2B model fit the cores of a large GPU all at once, two per
core: one loads while the other waits at its barrier."""

_NO_BIAS = mx.array([0.0])


def _supports(x: mx.array, input_gate: mx.array, recurrent_gate: mx.array, *_rest: Any) -> bool:
    return input_gate.dtype == recurrent_gate.dtype and FORWARD.validated(x.dtype, input_gate.dtype)


@RG_LRU.implementation(Backend.METAL, supports=_supports, gradient="own")
def _metal(
    x: mx.array,
    input_gate: mx.array,
    recurrent_gate: mx.array,
    a_param: mx.array,
    h0: mx.array,
    token_type: mx.array | None,
    bias_i: mx.array | None = None,
    bias_r: mx.array | None = None,
) -> Any:
    # The kernel has one stride for both biases: (1,) where there are none.
    given = bias_i if bias_i is not None else bias_r
    absent = _NO_BIAS if given is None else mx.zeros_like(given)
    biases = (absent if bias is None else bias for bias in (bias_i, bias_r))
    arrays: list[Any] = [x, input_gate, recurrent_gate, a_param, h0, token_type, *biases]
    y, h_last, _ = _kernel(*arrays)
    return y, h_last


@custom_function
def _kernel(
    x: mx.array,
    input_gate: mx.array,
    recurrent_gate: mx.array,
    a_param: mx.array,
    h0: mx.array,
    token_type: mx.array,
    bias_i: mx.array,
    bias_r: mx.array,
) -> Any:
    gates = input_gate, recurrent_gate
    return tuple(FORWARD.launch(x, *gates, a_param, h0, token_type, bias_i, bias_r))


@_kernel.vjp
def _kernel_vjp(primals: Any, cotangents: Any, outputs: Any) -> Any:
    x, input_gate, recurrent_gate, a_param, _, token_type, bias_i, bias_r = primals
    dy, dh_last, _ = cotangents
    launch = BACKWARD.validated(x.dtype, input_gate.dtype)
    gradients = (BACKWARD.launch if launch else _backward_reference)(
        x, input_gate, recurrent_gate, a_param, token_type, bias_i, bias_r, outputs[2], dy, dh_last
    )
    dx, d_input_gate, d_recurrent_gate, dh0, d_a_param, d_bias_i, d_bias_r = gradients
    return (
        dx,
        d_input_gate,
        d_recurrent_gate,
        d_a_param.astype(a_param.dtype),
        dh0,
        mx.zeros_like(token_type),
        d_bias_i.astype(bias_i.dtype) if bias_i.shape == a_param.shape else mx.zeros_like(bias_i),
        d_bias_r.astype(bias_r.dtype) if bias_r.shape == a_param.shape else mx.zeros_like(bias_r),
    )


def _geometry(batch: int, length: int, width: int, steps: int) -> dict[str, Any]:
    """Launch arguments of a kernel that scans `steps` steps per simdgroup, up to `SPLITS`."""
    splits = min(SPLITS, ceil_div(length, steps))
    return {"groups": (ceil_div(width, SIMD), 1, batch), "threadgroup": (SIMD, splits, 1)}


def _template(steps: int) -> dict[str, int]:
    return {"STEPS": steps, "CHUNK": CHUNK, "SPLITS": SPLITS}


def _dims(x: mx.array, token_type: mx.array, bias: mx.array) -> mx.array:
    _, length, width = x.shape
    bias_step = int(bias.shape == (width,))
    return mx.array([length, width, *token_strides(token_type), bias_step], mx.int32)


def _launch(*arrays: mx.array) -> Any:
    x, input_gate, recurrent_gate, a_param, h0, token_type, bias_i, bias_r = arrays
    batch, length, width = x.shape
    chunk_states = (batch, ceil_div(length, CHUNK), width)
    return FORWARD.run(
        [
            *(x, input_gate, recurrent_gate, a_param, h0, token_type),
            *(bias_i, bias_r, _dims(x, token_type, bias_i)),
        ],
        [(x.shape, x.dtype), (h0.shape, mx.float32), (chunk_states, mx.float32)],
        **_geometry(batch, length, width, FORWARD_STEPS),
        template={"T": x.dtype, **_template(FORWARD_STEPS)},
    )


def _launch_backward(*arrays: mx.array) -> Any:
    (
        x,
        input_gate,
        recurrent_gate,
        a_param,
        token_type,
        bias_i,
        bias_r,
        chunk_states,
        dy,
        dh_last,
    ) = arrays
    batch, length, width = x.shape
    dx, d_input_gate, d_recurrent_gate, dh0, d_channels = BACKWARD.run(
        [
            *(x, input_gate, recurrent_gate, a_param, token_type, bias_i, bias_r),
            *(chunk_states, dy, dh_last, _dims(x, token_type, bias_i)),
        ],
        [
            (x.shape, x.dtype),
            (input_gate.shape, input_gate.dtype),
            (recurrent_gate.shape, recurrent_gate.dtype),
            (dh_last.shape, mx.float32),
            ((batch, 3, width), mx.float32),
        ],
        **_geometry(batch, length, width, BACKWARD_STEPS),
        template={"T": x.dtype, "G": input_gate.dtype, **_template(BACKWARD_STEPS)},
    )
    d_a_param, d_bias_i, d_bias_r = d_channels.sum(axis=0)
    return dx, d_input_gate, d_recurrent_gate, dh0, d_a_param, d_bias_i, d_bias_r


def _forward_reference(*arrays: mx.array) -> Any:
    x, input_gate, recurrent_gate, a_param, h0, token_type, bias_i, bias_r = arrays
    h = _states(x, input_gate, recurrent_gate, a_param, h0, token_type, bias_i, bias_r)
    chunk_states = mx.concatenate([h0[:, None], h[:, CHUNK - 1 : -1 : CHUNK]], axis=1)
    return h.astype(x.dtype), h[:, -1], chunk_states


def _backward_reference(*arrays: mx.array) -> Any:
    (
        x,
        input_gate,
        recurrent_gate,
        a_param,
        token_type,
        bias_i,
        bias_r,
        chunk_states,
        dy,
        dh_last,
    ) = arrays

    def states(*differentiated: mx.array) -> Any:
        x, input_gate, recurrent_gate, h0, a_param, bias_i, bias_r = differentiated
        return reference(x, input_gate, recurrent_gate, a_param, h0, token_type, bias_i, bias_r)

    # The kernel's gradients of parameters are fp32; they are cast to the parameters' dtype later.
    parameters = [z.astype(mx.float32) for z in (a_param, bias_i, bias_r)]
    primals = [x, input_gate, recurrent_gate, chunk_states[:, 0], *parameters]
    return mx.vjp(states, primals, [dy, dh_last])[1]


_SAMPLE = (2, 150, 35)
"""More than one tile, and neither length nor width a multiple of anything."""
_MODEL = (1, 2048, 2560)


def _sample_inputs(
    x_dtype: mx.Dtype, gate_dtype: mx.Dtype, shape: tuple[int, int, int] = _SAMPLE
) -> tuple[mx.array, ...]:
    batch, length, width = shape
    types = (mx.arange(batch * length).reshape(batch, length) % 70 == 69).astype(mx.uint8)
    padded = mx.arange(length) >= length - 10 * mx.arange(batch)[:, None]
    # From a memory without end (a = 1) over thousands of tokens to a few.
    a_param = mx.where(mx.arange(width) == 0, -40.0, mx.arange(width) % 16 - 11.0)
    return (
        sample(shape, x_dtype, 0),
        sample(shape, gate_dtype, 1),
        sample(shape, gate_dtype, 2) - 2,
        a_param.astype(x_dtype),
        sample((batch, width), mx.float32, 4),
        mx.where(padded, mx.array(TokenType.PADDING, mx.uint8), types),
        sample((width,), x_dtype, 5),
        sample((width,), x_dtype, 6),
    )


def _sample_inputs_backward(
    x_dtype: mx.Dtype, gate_dtype: mx.Dtype, shape: tuple[int, int, int] = _SAMPLE
) -> tuple[mx.array, ...]:
    arguments = _sample_inputs(x_dtype, gate_dtype, shape)
    x, input_gate, recurrent_gate, a_param, h0, token_type, bias_i, bias_r = arguments
    chunk_states = _forward_reference(*arguments)[2]
    dy, dh_last = sample(x.shape, x_dtype, 7), sample(h0.shape, mx.float32, 8)
    parameters = a_param, token_type, bias_i, bias_r
    return x, input_gate, recurrent_gate, *parameters, chunk_states, dy, dh_last


_INPUTS = ("x", "input_gate", "recurrent_gate", "a_param")
_BIASES = ("input_gate_bias", "recurrent_gate_bias")
_GRADIENTS = ("dx", "d_input_gate", "d_recurrent_gate", "dh0")
FORWARD = MetalKernel(
    "rg_lru",
    inputs=(*_INPUTS, "h0", "token_type", *_BIASES, "dims"),
    outputs=("y", "h_last", "chunk_states"),
    launch=_launch,
    reference=_forward_reference,
    sample_inputs=_sample_inputs,
    benchmark_inputs=partial(_sample_inputs, shape=_MODEL),
    variants=[(dtype, dtype) for dtype in metal.FLOATS],
)
BACKWARD = MetalKernel(
    "rg_lru_backward",
    inputs=(*_INPUTS, "token_type", *_BIASES, "chunk_states", "dy", "dh_last", "dims"),
    outputs=(*_GRADIENTS, "d_channels"),
    results=(*_GRADIENTS, "d_a_param", "d_input_gate_bias", "d_recurrent_gate_bias"),
    launch=_launch_backward,
    reference=_backward_reference,
    sample_inputs=_sample_inputs_backward,
    benchmark_inputs=partial(_sample_inputs_backward, shape=_MODEL),
    variants=[(dtype, dtype) for dtype in metal.FLOATS],
)
