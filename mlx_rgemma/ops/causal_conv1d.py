"""The causal depthwise convolution before the recurrence, with its state.

Kernels: ``metal/causal_conv1d.metal`` and ``metal/causal_conv1d_backward.metal``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import mlx.core as mx

from mlx_rgemma.ops import metal
from mlx_rgemma.ops.autograd import custom_function
from mlx_rgemma.ops.backend import Backend, Operation
from mlx_rgemma.ops.metal import SIMD, MetalKernel, ceil_div, sample, token_strides


def causal_conv1d(
    x: mx.array,
    weight: mx.array,
    bias: mx.array | None = None,
    state: mx.array | None = None,
    *,
    segment_pos: mx.array | None = None,
    lengths: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Convolve each channel with its own K taps, of which the last meets the current token.

        y_t = bias + sum_j weight[K-1-j] x_{t-j},   j = 0 .. K-1

    Accumulates in float32. A tap that would reach into an earlier document counts as zero.

    Args:
        x: (B, L, D), any float.
        weight: (D, K, 1), as mlx-lm stores it.
        bias: (D,).
        state: (B, K-1, D). The inputs before the first one, oldest first; zeros when omitted.
        segment_pos: (1 or B, L), int. Each token's position in its document; None when no document
            starts inside the sequence and the state belongs to the same document.
        lengths: (B,), int. Real tokens of each sequence, the rest being padding on the right; None
            when all are.

    Returns:
        ``(y, new_state)``: (B, L, D) in the dtype of `x`, and the last K-1 real inputs
        (B, K-1, D), zeros where an input belongs to an earlier document than the last one.

    Raises:
        ValueError: If the shapes do not agree.
    """
    batch, _, width = x.shape
    taps = weight.shape[1]
    if weight.shape != (width, taps, 1):
        raise ValueError(
            f"[causal_conv1d] weight has shape {weight.shape}, expected ({width}, K, 1)."
        )
    memory = taps - 1
    if state is None:
        state = mx.zeros((batch, memory, width), x.dtype)
    elif state.shape != (batch, memory, width):
        raise ValueError(
            f"[causal_conv1d] state has shape {state.shape}, expected {(batch, memory, width)}."
        )
    state = state.astype(x.dtype)
    y, new_state = CAUSAL_CONV1D(x, weight, bias, state, segment_pos, lengths)
    return y, new_state


def reference(
    x: mx.array,
    weight: mx.array,
    bias: mx.array | None,
    state: mx.array,
    segment_pos: mx.array | None,
    lengths: mx.array | None,
) -> tuple[mx.array, mx.array]:
    """The equation above in plain MLX; arguments as `causal_conv1d`."""
    inputs = mx.concatenate([state, x], axis=1)
    if segment_pos is not None:
        segment_pos = mx.broadcast_to(segment_pos, x.shape[:2])
    y = convolve(inputs, weight, bias, segment_pos, x.shape[1])
    return y.astype(x.dtype), last_inputs(inputs, state.shape[1], segment_pos, lengths)


def convolve(
    inputs: mx.array,
    weight: mx.array,
    bias: mx.array | None,
    segment_pos: mx.array | None,
    length: int,
) -> mx.array:
    """Return the weighted sum over the taps, fp32; `inputs` starts K-1 tokens before the output."""
    taps = weight.shape[1]
    weight = weight.astype(mx.float32)
    if length == 1 and segment_pos is None:
        y = (inputs.astype(mx.float32) * weight[..., 0].T).sum(axis=1, keepdims=True)
        return y if bias is None else y + bias.astype(mx.float32)

    def term(back: int) -> mx.array:
        start = taps - 1 - back
        return inputs[:, start : start + length].astype(mx.float32) * weight[:, start, 0]

    y = term(0) if bias is None else bias.astype(mx.float32) + term(0)
    for back in range(1, taps):
        if segment_pos is None:
            y = y + term(back)
        else:
            y = y + mx.where((segment_pos >= back)[..., None], term(back), 0.0)
    return y


def last_inputs(
    inputs: mx.array,
    memory: int,
    segment_pos: mx.array | None,
    lengths: mx.array | None,
) -> mx.array:
    """Return each sequence's last `memory` inputs, oldest first, of its last document only."""
    if lengths is None:
        state = inputs[:, inputs.shape[1] - memory :]
        last_pos = None if segment_pos is None else segment_pos[:, -1:]
    else:
        index = lengths[:, None] + mx.arange(memory)
        state = mx.take_along_axis(inputs, index[..., None], axis=1)
        last_pos = None
        if segment_pos is not None:
            last = mx.maximum(lengths - 1, 0)[:, None]
            # A sequence without a token keeps its state.
            last_pos = mx.where(
                lengths[:, None] > 0, mx.take_along_axis(segment_pos, last, axis=1), memory
            )
    if last_pos is None:
        return state
    distance = mx.arange(memory - 1, -1, -1)  # from the last token
    return mx.where((last_pos >= distance)[..., None], state, mx.zeros_like(state))


CAUSAL_CONV1D = Operation(reference)


# The Metal kernels. An argument that is left out becomes one value that holds for all.

STEPS = 16
"""Tokens that a thread slides over."""
GROUPS = 8
"""Simdgroups of a threadgroup, at most."""

_NO_BIAS = mx.array([0.0])
_NO_BORDER = mx.array([2**30])


def _supports(x: mx.array, weight: mx.array, *_rest: Any) -> bool:
    return weight.shape[1] > 1 and FORWARD.validated(x.dtype, weight.shape[1])


@CAUSAL_CONV1D.implementation(Backend.METAL, supports=_supports, gradient="own")
def _metal(
    x: mx.array,
    weight: mx.array,
    bias: mx.array | None,
    state: mx.array | None,
    segment_pos: mx.array | None,
    lengths: mx.array | None,
) -> Any:
    bias = _NO_BIAS if bias is None else bias
    segment_pos = _NO_BORDER if segment_pos is None else segment_pos
    lengths = mx.array([x.shape[1]]) if lengths is None else lengths
    arrays: list[Any] = [x, weight, bias, state, segment_pos, lengths]
    return _kernel(*arrays)


@custom_function
def _kernel(
    x: mx.array,
    weight: mx.array,
    bias: mx.array,
    state: mx.array,
    segment_pos: mx.array,
    lengths: mx.array,
) -> Any:
    return tuple(FORWARD.launch(x, weight, bias, state, segment_pos, lengths))


@_kernel.vjp
def _kernel_vjp(primals: Any, cotangents: Any, _outputs: Any) -> Any:
    x, weight, bias, state, segment_pos, lengths = primals
    launch = BACKWARD.validated(x.dtype, weight.shape[1])
    dx, dweight, dbias, dstate = (BACKWARD.launch if launch else _backward_reference)(
        x, weight, bias, state, segment_pos, lengths, *cotangents
    )
    return (
        dx,
        dweight.astype(weight.dtype),
        dbias.astype(bias.dtype) if bias.size == dbias.size else mx.zeros_like(bias),
        dstate,
        mx.zeros_like(segment_pos),
        mx.zeros_like(lengths),
    )


def _dims(x: mx.array, bias: mx.array, segment_pos: mx.array, lengths: mx.array) -> mx.array:
    _, length, width = x.shape
    strides = [int(bias.size > 1), *token_strides(segment_pos), int(lengths.size > 1)]
    return mx.array([length, width, *strides], mx.int32)


def _geometry(x: mx.array) -> dict[str, Any]:
    batch, length, width = x.shape
    groups = min(GROUPS, ceil_div(length, STEPS))
    return {
        "groups": (
            ceil_div(width, SIMD),
            ceil_div(length, STEPS * groups),
            batch,
        ),
        "threadgroup": (SIMD, groups, 1),
    }


def _launch(
    x: mx.array,
    weight: mx.array,
    bias: mx.array,
    state: mx.array,
    segment_pos: mx.array,
    lengths: mx.array,
) -> Any:
    return FORWARD.run(
        [x, weight, bias, state, segment_pos, lengths, _dims(x, bias, segment_pos, lengths)],
        [(x.shape, x.dtype), (state.shape, x.dtype)],
        **_geometry(x),
        template={"T": x.dtype, "K": weight.shape[1], "STEPS": STEPS},
    )


def _launch_backward(
    x: mx.array,
    weight: mx.array,
    bias: mx.array,
    state: mx.array,
    segment_pos: mx.array,
    lengths: mx.array,
    dy: mx.array,
    d_new_state: mx.array,
) -> Any:
    batch, _, width = x.shape
    taps = weight.shape[1]
    geometry = _geometry(x)
    shares = (batch * geometry["groups"][1], taps + 1, width)
    dims = _dims(x, bias, segment_pos, lengths)
    dx, dstate, d_parameters = BACKWARD.run(
        [x, weight, state, segment_pos, lengths, dy, d_new_state, dims],
        [(x.shape, x.dtype), (state.shape, x.dtype), (shares, mx.float32)],
        **geometry,
        template={"T": x.dtype, "K": taps, "STEPS": STEPS, "GROUPS": GROUPS},
    )
    d_parameters = d_parameters.sum(axis=0)
    return dx, d_parameters[:taps].T[..., None], d_parameters[taps], dstate


def _backward_reference(
    x: mx.array,
    weight: mx.array,
    bias: mx.array,
    state: mx.array,
    segment_pos: mx.array,
    lengths: mx.array,
    dy: mx.array,
    d_new_state: mx.array,
) -> Any:
    given_pos = None if segment_pos.ndim == 1 else segment_pos
    given_lengths = lengths if lengths.size == x.shape[0] else None

    def outputs(x: mx.array, weight: mx.array, bias: mx.array, state: mx.array) -> Any:
        return reference(x, weight, bias, state, given_pos, given_lengths)

    # The kernel's gradients of parameters are fp32; they are cast to the parameters' dtype later.
    bias = mx.broadcast_to(bias, x.shape[2:]).astype(mx.float32)
    primals = [x, weight.astype(mx.float32), bias, state]
    dx, dweight, dbias, dstate = mx.vjp(outputs, primals, [dy, d_new_state])[1]
    return dx, dweight, dbias, dstate


_SAMPLE = (8, 150, 35)
"""More tokens than a threadgroup takes, and neither length nor width an integer of anything."""
_MODEL = (1, 2048, 2560)


def _sample_inputs(
    dtype: mx.Dtype, taps: int, shape: tuple[int, int, int] = _SAMPLE
) -> tuple[mx.array, ...]:
    """Documents of five tokens; sequences without tokens, and shorter than the kernel."""
    batch, length, width = shape
    return (
        sample(shape, dtype, 0),
        sample((width, taps, 1), dtype, 1),
        sample((width,), dtype, 2),
        sample((batch, taps - 1, width), dtype, 3),
        (mx.arange(length) + mx.arange(batch)[:, None]) % 5,
        mx.array([length, 0, 1, 2, 3, 140, 71, length][:batch]),
    )


def _sample_inputs_backward(
    dtype: mx.Dtype, taps: int, shape: tuple[int, int, int] = _SAMPLE
) -> tuple[mx.array, ...]:
    arguments = _sample_inputs(dtype, taps, shape)
    dy = sample(shape, dtype, 4)
    return *arguments, dy, sample(arguments[3].shape, dtype, 5)


FORWARD = MetalKernel(
    "causal_conv1d",
    inputs=("x", "weight", "bias", "state", "segment_pos", "lengths", "dims"),
    outputs=("y", "new_state"),
    launch=_launch,
    reference=reference,
    sample_inputs=_sample_inputs,
    benchmark_inputs=partial(_sample_inputs, shape=_MODEL),
    variants=[(dtype, 4) for dtype in metal.FLOATS],
)
BACKWARD = MetalKernel(
    "causal_conv1d_backward",
    inputs=("x", "weight", "state", "segment_pos", "lengths", "dy", "d_new_state", "dims"),
    outputs=("dx", "dstate", "d_parameters"),
    results=("dx", "dweight", "dbias", "dstate"),
    launch=_launch_backward,
    reference=_backward_reference,
    sample_inputs=_sample_inputs_backward,
    benchmark_inputs=partial(_sample_inputs_backward, shape=_MODEL),
    variants=[(dtype, 4) for dtype in metal.FLOATS],
)
