"""The linear recurrence ``h_t = a_t h_{t-1} + x_t``, without a loop over time.

Two forms: the kernels ``metal/linear_scan.metal`` and ``metal/linear_scan_backward.metal`` where
`kernels` lets them run, and plain MLX operations. In the plain form the sequence is cut into chunks
of `CHUNK` steps. All chunks advance one step together, so the Python loop has `CHUNK` rounds
whatever the length; what each chunk hands to the next is again a linear recurrence, `CHUNK` times
shorter, solved the same way. In both forms coefficients are only ever multiplied (never divided, no
logarithms), so 0, 1 and 1e-30 are all exact enough.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import mlx.core as mx

from mlx_rgemma.ops import kernels
from mlx_rgemma.ops.fused import custom_function

CHUNK = 4
FEW_STEPS = 8
"""Steps that are taken one after the other."""


def linear_scan(
    x: mx.array,
    a: mx.array,
    h0: mx.array | None = None,
    reset: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Run ``h_t = a_t h_{t-1} + x_t`` along the time axis (Griffin, arXiv:2402.19427, eq. 4).

    Accumulates in float32 whatever the inputs' dtype. Differentiable in `x`, `a` and `h0`; the
    backward pass is the same recurrence run from the end, and keeps only the inputs and `y`.

    Args:
        x: (B, L, D), any float. What is added at each step.
        a: (B, L, D), any float. What the state is multiplied with at each step.
        h0: (B, D), fp32. The state before the first step; zeros when omitted.
        reset: (1 or B, L), bool. True where the state is dropped first: ``a`` counts as 0.

    Returns:
        ``(y, h_last)``: the states (B, L, D) in the dtype of `x`, and the last one (B, D) in fp32.

    Raises:
        ValueError: If the shapes do not agree.
    """
    _check(x, a, h0, reset)
    if h0 is None:
        h0 = mx.zeros((x.shape[0], x.shape[2]), mx.float32)
    h0 = h0.astype(mx.float32)
    if FORWARD.usable(x.dtype, a.dtype):
        fused = _fused(x, a, h0, _NO_RESET if reset is None else reset)
        return fused[0], fused[1]
    h = _plain(x, a, h0, reset)
    return h.astype(x.dtype), h[:, -1]


def _plain(x: mx.array, a: mx.array, h0: mx.array, reset: mx.array | None) -> mx.array:
    """All states, (B, L, D) fp32, in plain MLX operations."""
    a = a.astype(mx.float32)
    if reset is not None:
        a = mx.where(reset[..., None], 0.0, a)
    states: mx.array = _linear_scan(x.astype(mx.float32), a, h0)
    return states


@custom_function
def _linear_scan(x: mx.array, a: mx.array, h0: mx.array) -> mx.array:
    return scan_reference(x, a, h0)


@_linear_scan.vjp
def _linear_scan_vjp(primals, cotangent, h):
    _, a, h0 = primals
    return scan_gradients(a, h0, h, cotangent)


def scan_gradients(
    a: mx.array, h0: mx.array, h: mx.array, cotangent: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Gradients of the recurrence with respect to x, a and h0.

    Args:
        a, h: (B, L, D), fp32. The coefficients and the states that they gave.
        h0: (B, D), fp32.
        cotangent: (B, L, D), fp32. The gradient of the loss with respect to each state.

    Returns:
        ``(dx, da, dh0)``, shaped like x, a and h0.
    """
    # dh_t = g_t + a_{t+1} dh_{t+1}: the same recurrence, from the end, with a moved by one step.
    following = mx.concatenate([a[:, 1:], mx.zeros_like(a[:, :1])], axis=1)
    dh = scan_reference(cotangent, following, None, reverse=True)
    previous = mx.concatenate([h0[:, None], h[:, :-1]], axis=1)
    return dh, dh * previous, a[:, 0] * dh[:, 0]


def scan_reference(
    x: mx.array, a: mx.array, h0: mx.array | None, *, reverse: bool = False
) -> mx.array:
    """The recurrence in plain MLX operations, fp32: (B, L, D), (B, L, D), (B, D) -> (B, L, D).

    `reverse` runs from the last step to the first.
    """
    batch, length, width = x.shape
    if length <= FEW_STEPS:
        return _scan_steps(x, a, h0, reverse)

    chunks = -(-length // CHUNK)
    padding = chunks * CHUNK - length
    if padding:
        # A step with a = 1 and x = 0 changes nothing; in reverse it comes before the sequence.
        widths = [(0, 0), (0, padding), (0, 0)]
        x = mx.pad(x, widths)
        a = mx.pad(a, widths, constant_values=1.0)

    # Step i of all chunks is a view whose rows are as far apart as the chunks are long: copying it
    # into one piece first would cost more than it saves.
    x_steps, a_steps = (
        mx.split(z.reshape(batch, chunks, CHUNK, width), CHUNK, axis=2) for z in (x, a)
    )
    reached, product = list(x_steps), list(a_steps)
    steps = range(CHUNK - 1, -1, -1) if reverse else range(CHUNK)
    for before, i in pairwise(steps):
        reached[i] = a_steps[i] * reached[before] + x_steps[i]
        product[i] = a_steps[i] * product[before]

    last = steps[-1]
    h, p = (z[last].reshape(batch, chunks, width) for z in (reached, product))
    carry = scan_reference(h, p, h0, reverse=reverse)
    edge = mx.zeros_like(carry[:, :1]) if h0 is None else h0[:, None]
    if reverse:
        entering = mx.concatenate([carry[:, 1:], edge], axis=1)
    else:
        entering = mx.concatenate([edge, carry[:, :-1]], axis=1)
    entering = entering[:, :, None]
    y = [
        carry[:, :, None] if i == last else product[i] * entering + reached[i] for i in range(CHUNK)
    ]
    return mx.concatenate(y, axis=2).reshape(batch, chunks * CHUNK, width)[:, :length]


def _scan_steps(x: mx.array, a: mx.array, h0: mx.array | None, reverse: bool) -> mx.array:
    """At most `FEW_STEPS` steps, one after the other."""
    length = x.shape[1]
    if length == 1:
        return x if h0 is None else a * h0[:, None] + x
    h = None if h0 is None else h0[:, None]
    x_steps, a_steps = mx.split(x, length, axis=1), mx.split(a, length, axis=1)
    states = list(x_steps)
    for t in range(length - 1, -1, -1) if reverse else range(length):
        states[t] = h = x_steps[t] if h is None else a_steps[t] * h + x_steps[t]
    return mx.concatenate(states, axis=1)


# The fused form. Its backward pass starts from the state before each `SEGMENT` steps, which the
# forward pass leaves behind, and so keeps the inputs alone.

SEGMENT = 32
FORWARD_STEPS, BACKWARD_STEPS = 8, 4
SPLITS = 8
"""Simdgroups of a threadgroup, at most; each takes that many steps in registers at a time.
``SPLITS * BACKWARD_STEPS == SEGMENT``: a backward tile begins where the forward pass left a state.
At 256 threads the 80 threadgroups of the 2B model fit the cores of a large GPU all at once, two to
a core: one loads while the other waits at its barrier. The exchange costs SPLITS / STEPS rounds an
element."""

_NO_RESET = mx.array([False])


def scan_geometry(batch: int, length: int, width: int, steps: int) -> dict[str, Any]:
    """Launch arguments of a kernel that scans `steps` steps a simdgroup, up to `SPLITS` at once."""
    splits = min(SPLITS, kernels.ceil_div(length, steps))
    return {
        "groups": (kernels.ceil_div(width, kernels.SIMD), 1, batch),
        "threadgroup": (kernels.SIMD, splits, 1),
    }


def scan_template(steps: int) -> dict[str, int]:
    """Template arguments of such a kernel."""
    return {"STEPS": steps, "SEGMENT": SEGMENT, "SPLITS": SPLITS}


def scan_entries(h0: mx.array, h: mx.array) -> mx.array:
    """The states before every `SEGMENT` steps: (B, D), (B, L, D) -> (B, ceil(L / SEGMENT), D)."""
    return mx.concatenate([h0[:, None], h[:, SEGMENT - 1 : -1 : SEGMENT]], axis=1)


def token_strides(array: mx.array) -> list[int]:
    """Strides of a (1 or B, 1 or L) array from row to row and from token to token, for a kernel.

    0 where one value holds for all; also for an array of one dimension, a single value.
    """
    if array.ndim == 1:
        return [0, 0]
    rows, steps = array.shape
    return [steps if rows > 1 else 0, 1 if steps > 1 else 0]


@custom_function
def _fused(x, a, h0, reset):
    return tuple(FORWARD.launch(x, a, h0, reset))


@_fused.vjp
def _fused_vjp(primals, cotangents, outputs):
    x, a, _, reset = primals
    dy, dh_last, _ = cotangents
    arguments = (x, a, reset, outputs[2], dy, dh_last)
    usable = BACKWARD.usable(x.dtype, a.dtype)
    dx, da, dh0 = (BACKWARD.launch if usable else _reference_backward)(*arguments)
    return dx, da, dh0, mx.zeros_like(reset)


def _launch(x, a, h0, reset):
    batch, length, width = x.shape
    dims = mx.array([length, width, *token_strides(reset)], mx.int32)
    entries = (batch, kernels.ceil_div(length, SEGMENT), width)
    return FORWARD.run(
        [x, a, h0, reset, dims],
        [(x.shape, x.dtype), (h0.shape, mx.float32), (entries, mx.float32)],
        **scan_geometry(batch, length, width, FORWARD_STEPS),
        template={"T": x.dtype, **scan_template(FORWARD_STEPS)},
    )


def _launch_backward(x, a, reset, entry, dy, dh_last):
    batch, length, width = x.shape
    dims = mx.array([length, width, *token_strides(reset)], mx.int32)
    return BACKWARD.run(
        [x, a, reset, entry, dy, dh_last, dims],
        [(x.shape, x.dtype), (a.shape, a.dtype), (dh_last.shape, mx.float32)],
        **scan_geometry(batch, length, width, BACKWARD_STEPS),
        template={"T": x.dtype, "A": a.dtype, **scan_template(BACKWARD_STEPS)},
    )


def _reference(x, a, h0, reset):
    h = _plain(x, a, h0, reset)
    return h.astype(x.dtype), h[:, -1], scan_entries(h0, h)


def _reference_backward(x, a, reset, entry, dy, dh_last):
    def states(x, a, h0):
        h = _plain(x, a, h0, reset)
        return h.astype(x.dtype), h[:, -1]

    return mx.vjp(states, [x, a, entry[:, 0]], [dy, dh_last])[1]


_TINY = (2, 150, 35)
"""More than one tile, and neither length nor width a whole number of anything."""
_MODEL = (1, 2048, 2560)


def _example(
    x_dtype: mx.Dtype, a_dtype: mx.Dtype, shape: tuple[int, int, int] = _TINY
) -> tuple[mx.array, ...]:
    batch, length, width = shape
    reset = mx.arange(batch * length).reshape(batch, length) % 70 == 69
    a = mx.sigmoid(2.0 * kernels.sample(shape, mx.float32, 1)).astype(a_dtype)
    h0 = kernels.sample((batch, width), mx.float32, 2)
    return kernels.sample(shape, x_dtype, 0), a, h0, reset


def _example_backward(
    x_dtype: mx.Dtype, a_dtype: mx.Dtype, shape: tuple[int, int, int] = _TINY
) -> tuple[mx.array, ...]:
    x, a, h0, reset = _example(x_dtype, a_dtype, shape)
    entry = _reference(x, a, h0, reset)[2]
    dy = kernels.sample(x.shape, x_dtype, 3)
    return x, a, reset, entry, dy, kernels.sample(h0.shape, mx.float32, 4)


VARIANTS = tuple((x, a) for x in kernels.FLOATS for a in sorted({x, mx.float32}, key=str))
FORWARD = kernels.register(
    "linear_scan",
    inputs=("x", "a", "h0", "reset", "dims"),
    outputs=("y", "h_last", "entry"),
    launch=_launch,
    reference=_reference,
    example=_example,
    workload=partial(_example, shape=_MODEL),
    variants=VARIANTS,
)
BACKWARD = kernels.register(
    "linear_scan_backward",
    inputs=("x", "a", "reset", "entry", "dy", "dh_last", "dims"),
    outputs=("dx", "da", "dh0"),
    launch=_launch_backward,
    reference=_reference_backward,
    example=_example_backward,
    workload=partial(_example_backward, shape=_MODEL),
    variants=VARIANTS,
)


def _check(x: mx.array, a: mx.array, h0: mx.array | None, reset: mx.array | None) -> None:
    if x.ndim != 3 or x.shape[1] == 0:
        raise ValueError(f"[linear_scan] x must be (B, L, D) with L > 0, not {x.shape}.")
    if a.shape != x.shape:
        raise ValueError(f"[linear_scan] a has shape {a.shape}, x has {x.shape}.")
    if h0 is not None and h0.shape != (x.shape[0], x.shape[2]):
        raise ValueError(f"[linear_scan] h0 has shape {h0.shape}, x has {x.shape}.")
    if reset is not None and reset.shape not in (x.shape[:2], (1, x.shape[1])):
        raise ValueError(f"[linear_scan] reset has shape {reset.shape}, x has {x.shape}.")
