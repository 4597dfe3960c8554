"""The causal depthwise convolution before the recurrence, with its state.

Two forms: the kernels ``metal/causal_conv1d.metal`` and ``metal/causal_conv1d_backward.metal``
where `kernels` lets them run, and plain MLX operations; for a prompt on a Linux CPU, a loop.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rgemma.ops import kernels, loops
from mlx_rgemma.ops.fused import custom_function
from mlx_rgemma.ops.scan import token_strides


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
            starts inside the sequence and the state belongs to the document that goes on.
        lengths: (B,), int. How many tokens of each row are real, the rest being padding on the
            right; None when all are.

    Returns:
        ``(y, new_state)``: (B, L, D) in the dtype of `x`, and the last K-1 real inputs
        (B, K-1, D), zeros where an input belongs to an earlier document than the last one.

    Raises:
        ValueError: If the shapes do not agree.
    """
    batch, length, width = x.shape
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
    if memory > 0 and FORWARD.usable(x.dtype, taps):
        bias = _NO_BIAS if bias is None else bias
        segment_pos = _NO_BORDER if segment_pos is None else segment_pos
        lengths = mx.array([length]) if lengths is None else lengths
        fused = _fused(x, weight, bias, state, segment_pos, lengths)
        return fused[0], fused[1]
    return _plain(x, weight, bias, state, segment_pos, lengths)


def _plain(
    x: mx.array,
    weight: mx.array,
    bias: mx.array | None,
    state: mx.array,
    segment_pos: mx.array | None,
    lengths: mx.array | None,
) -> tuple[mx.array, mx.array]:
    inputs = mx.concatenate([state, x], axis=1)
    if segment_pos is not None:
        segment_pos = mx.broadcast_to(segment_pos, x.shape[:2])
    y = _by_loop(inputs, weight, bias, segment_pos, x) if loops.worthwhile(x) else None
    if y is None:
        y = _convolve(inputs, weight, bias, segment_pos, x.shape[1])
    return y.astype(x.dtype), _last_inputs(inputs, state.shape[1], segment_pos, lengths)


def _by_loop(
    inputs: mx.array,
    weight: mx.array,
    bias: mx.array | None,
    segment_pos: mx.array | None,
    x: mx.array,
) -> mx.array | None:
    """As `_convolve`, without a gradient; None where arrays have no values."""
    batch, length, width = x.shape
    pos = mx.array(weight.shape[1]) if segment_pos is None else segment_pos
    ready = loops.ready(
        inputs,
        weight[..., 0].T,
        mx.zeros((width,)) if bias is None else bias,
        mx.broadcast_to(pos, (batch, length)).astype(mx.int32),
    )
    if ready is None:
        return None
    y = np.empty(x.shape, np.float32)
    loops.run("causal_conv1d", batch * length, *ready, y)
    return mx.array(y)


def _convolve(
    inputs: mx.array,
    weight: mx.array,
    bias: mx.array | None,
    segment_pos: mx.array | None,
    length: int,
) -> mx.array:
    """The weighted sum over the taps, fp32; `inputs` starts K-1 tokens before the output."""
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


def _last_inputs(
    inputs: mx.array,
    memory: int,
    segment_pos: mx.array | None,
    lengths: mx.array | None,
) -> mx.array:
    """The last `memory` inputs of each row, oldest first, of the row's last document only."""
    if lengths is None:
        state = inputs[:, inputs.shape[1] - memory :]
        last_pos = None if segment_pos is None else segment_pos[:, -1:]
    else:
        index = lengths[:, None] + mx.arange(memory)
        state = mx.take_along_axis(inputs, index[..., None], axis=1)
        last_pos = None
        if segment_pos is not None:
            last = mx.maximum(lengths - 1, 0)[:, None]
            # A row without a token keeps its state as it is.
            last_pos = mx.where(
                lengths[:, None] > 0, mx.take_along_axis(segment_pos, last, axis=1), memory
            )
    if last_pos is None:
        return state
    distance = mx.arange(memory - 1, -1, -1)  # from the last token
    return mx.where((last_pos >= distance)[..., None], state, mx.zeros_like(state))


# The fused form. What the caller leaves out becomes one value that holds for all.

STEPS = 16
"""Tokens that a thread slides over."""
GROUPS = 8
"""Simdgroups of a threadgroup, at most."""

_NO_BIAS = mx.array([0.0])
_NO_BORDER = mx.array([2**30])


@custom_function
def _fused(x, weight, bias, state, segment_pos, lengths):
    return tuple(FORWARD.launch(x, weight, bias, state, segment_pos, lengths))


@_fused.vjp
def _fused_vjp(primals, cotangents, _outputs):
    x, weight, bias, state, segment_pos, lengths = primals
    usable = BACKWARD.usable(x.dtype, weight.shape[1])
    dx, dweight, dbias, dstate = (BACKWARD.launch if usable else _reference_backward)(
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
    groups = min(GROUPS, kernels.ceil_div(length, STEPS))
    return {
        "groups": (
            kernels.ceil_div(width, kernels.SIMD),
            kernels.ceil_div(length, STEPS * groups),
            batch,
        ),
        "threadgroup": (kernels.SIMD, groups, 1),
    }


def _launch(x, weight, bias, state, segment_pos, lengths):
    return FORWARD.run(
        [x, weight, bias, state, segment_pos, lengths, _dims(x, bias, segment_pos, lengths)],
        [(x.shape, x.dtype), (state.shape, x.dtype)],
        **_geometry(x),
        template={"T": x.dtype, "K": weight.shape[1], "STEPS": STEPS},
    )


def _launch_backward(x, weight, bias, state, segment_pos, lengths, dy, d_new_state):
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


def _reference_backward(x, weight, bias, state, segment_pos, lengths, dy, d_new_state):
    given_pos = None if segment_pos.ndim == 1 else segment_pos
    given_lengths = lengths if lengths.size == x.shape[0] else None

    def outputs(x, weight, bias, state):
        return _plain(x, weight, bias, state, given_pos, given_lengths)

    # The kernel's gradients of parameters are fp32: those of the arrays given are cast later.
    bias = mx.broadcast_to(bias, x.shape[2:]).astype(mx.float32)
    primals = [x, weight.astype(mx.float32), bias, state]
    dx, dweight, dbias, dstate = mx.vjp(outputs, primals, [dy, d_new_state])[1]
    return dx, dweight, dbias, dstate


_TINY = (8, 150, 35)
"""More tokens than a threadgroup takes, and neither length nor width a whole number of anything."""
_MODEL = (1, 2048, 2560)


def _example(
    dtype: mx.Dtype, taps: int, shape: tuple[int, int, int] = _TINY
) -> tuple[mx.array, ...]:
    """Documents of five tokens; rows without a token, and of fewer than the taps."""
    batch, length, width = shape
    return (
        kernels.sample(shape, dtype, 0),
        kernels.sample((width, taps, 1), dtype, 1),
        kernels.sample((width,), dtype, 2),
        kernels.sample((batch, taps - 1, width), dtype, 3),
        (mx.arange(length) + mx.arange(batch)[:, None]) % 5,
        mx.array([length, 0, 1, 2, 3, 140, 71, length][:batch]),
    )


def _example_backward(
    dtype: mx.Dtype, taps: int, shape: tuple[int, int, int] = _TINY
) -> tuple[mx.array, ...]:
    arguments = _example(dtype, taps, shape)
    dy = kernels.sample(shape, dtype, 4)
    return *arguments, dy, kernels.sample(arguments[3].shape, dtype, 5)


FORWARD = kernels.register(
    "causal_conv1d",
    inputs=("x", "weight", "bias", "state", "segment_pos", "lengths", "dims"),
    outputs=("y", "new_state"),
    launch=_launch,
    reference=_plain,
    example=_example,
    workload=partial(_example, shape=_MODEL),
    variants=[(dtype, 4) for dtype in kernels.FLOATS],
)
BACKWARD = kernels.register(
    "causal_conv1d_backward",
    inputs=("x", "weight", "state", "segment_pos", "lengths", "dy", "d_new_state", "dims"),
    outputs=("dx", "dstate", "d_parameters"),
    results=("dx", "dweight", "dbias", "dstate"),
    launch=_launch_backward,
    reference=_reference_backward,
    example=_example_backward,
    workload=partial(_example_backward, shape=_MODEL),
    variants=[(dtype, 4) for dtype in kernels.FLOATS],
)
