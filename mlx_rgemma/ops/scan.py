"""The linear recurrence ``h_t = a_t h_{t-1} + x_t`` in plain MLX, without a loop over time.

The sequence is cut into chunks of `CHUNK` steps. All chunks advance one step together, so the
Python loop has `CHUNK` rounds whatever the length; the chunks' last states are again a linear
recurrence, `CHUNK` times shorter, solved the same way. Coefficients are only multiplied (never
divided, no logarithms), so 0, 1 and 1e-30 are all exact enough.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import mlx.core as mx

from mlx_rgemma.ops.autograd import custom_function

CHUNK = 4
SEQUENTIAL_STEPS = 8
"""Longest sequence whose steps are taken one after the other."""


def linear_scan(x: mx.array, a: mx.array, h0: mx.array) -> mx.array:
    """Return all states of ``h_t = a_t h_{t-1} + x_t``.

    The backward pass is the same recurrence from the end; it keeps only `a`, `h0` and the states.

    Args:
        x: (B, L, D), fp32. Added at each step.
        a: (B, L, D), fp32. Multiplies the state at each step.
        h0: (B, D), fp32. The state before the first step.

    Returns:
        (B, L, D), fp32.
    """
    states: mx.array = _linear_scan(x, a, h0)
    return states


@custom_function
def _linear_scan(x: mx.array, a: mx.array, h0: mx.array) -> mx.array:
    return _scan(x, a, h0)


@_linear_scan.vjp
def _linear_scan_vjp(primals: Any, cotangent: Any, h: mx.array) -> Any:
    _, a, h0 = primals
    return scan_gradients(a, h0, h, cotangent)


def scan_gradients(
    a: mx.array, h0: mx.array, h: mx.array, cotangent: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Return the gradients of the recurrence with respect to x, a and h0.

    Args:
        a, h: (B, L, D), fp32. The coefficients and the states that they gave.
        h0: (B, D), fp32.
        cotangent: (B, L, D), fp32. The gradient of the loss with respect to each state.
    """
    # dh_t = g_t + a_{t+1} dh_{t+1}: the same recurrence, from the end, with a moved by one step.
    following = mx.concatenate([a[:, 1:], mx.zeros_like(a[:, :1])], axis=1)
    dh = _scan(cotangent, following, None, reverse=True)
    previous = mx.concatenate([h0[:, None], h[:, :-1]], axis=1)
    return dh, dh * previous, a[:, 0] * dh[:, 0]


def _scan(x: mx.array, a: mx.array, h0: mx.array | None, *, reverse: bool = False) -> mx.array:
    """Run the recurrence; `reverse` from the last step to the first, h0 = None from zeros."""
    batch, length, width = x.shape
    if length <= SEQUENTIAL_STEPS:
        return _sequential_scan(x, a, h0, reverse)

    chunks = -(-length // CHUNK)
    padding = chunks * CHUNK - length
    if padding:
        # A step with a = 1 and x = 0 changes nothing; in reverse it comes before the sequence.
        widths = [(0, 0), (0, padding), (0, 0)]
        x = mx.pad(x, widths)
        a = mx.pad(a, widths, constant_values=1.0)

    # Step i of all chunks is a strided view: a contiguous copy would cost more than it saves.
    x_steps, a_steps = (
        mx.split(z.reshape(batch, chunks, CHUNK, width), CHUNK, axis=2) for z in (x, a)
    )
    h, product = list(x_steps), list(a_steps)
    steps = range(CHUNK - 1, -1, -1) if reverse else range(CHUNK)
    for before, i in pairwise(steps):
        h[i] = a_steps[i] * h[before] + x_steps[i]
        product[i] = a_steps[i] * product[before]

    last = steps[-1]
    h_last, product_last = (z[last].reshape(batch, chunks, width) for z in (h, product))
    carry = _scan(h_last, product_last, h0, reverse=reverse)
    edge = mx.zeros_like(carry[:, :1]) if h0 is None else h0[:, None]
    if reverse:
        chunk_h0 = mx.concatenate([carry[:, 1:], edge], axis=1)
    else:
        chunk_h0 = mx.concatenate([edge, carry[:, :-1]], axis=1)
    chunk_h0 = chunk_h0[:, :, None]
    y = [carry[:, :, None] if i == last else product[i] * chunk_h0 + h[i] for i in range(CHUNK)]
    return mx.concatenate(y, axis=2).reshape(batch, chunks * CHUNK, width)[:, :length]


def _sequential_scan(x: mx.array, a: mx.array, h0: mx.array | None, reverse: bool) -> mx.array:
    """Take at most `SEQUENTIAL_STEPS` steps, one after the other."""
    length = x.shape[1]
    if length == 1:
        return x if h0 is None else a * h0[:, None] + x
    h = None if h0 is None else h0[:, None]
    x_steps, a_steps = mx.split(x, length, axis=1), mx.split(a, length, axis=1)
    states = list(x_steps)
    for t in range(length - 1, -1, -1) if reverse else range(length):
        states[t] = h = x_steps[t] if h is None else a_steps[t] * h + x_steps[t]
    return mx.concatenate(states, axis=1)
