"""The causal depthwise convolution before the recurrence, with its state."""

from __future__ import annotations

import mlx.core as mx


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
        segment_pos: (B, L), int. Each token's position in its document; None when no document
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
    inputs = mx.concatenate([state.astype(x.dtype), x], axis=1)
    y = _convolve(inputs, weight, bias, segment_pos, length)
    return y.astype(x.dtype), _last_inputs(inputs, memory, segment_pos, lengths)


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
    y = None if bias is None else bias.astype(mx.float32)
    for back in range(taps):
        start = taps - 1 - back
        term = inputs[:, start : start + length].astype(mx.float32) * weight[:, start, 0]
        if segment_pos is not None and back > 0:
            term = mx.where((segment_pos >= back)[..., None], term, 0.0)
        y = term if y is None else y + term
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
