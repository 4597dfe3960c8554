"""The decode step of Griffin's recurrent block between its projections, in one launch.

Where `kernels` allows it, for at most `MAX_STEPS` tokens a row, gate blocks of up to 256 channels
and a convolution of 2 to 8 taps, it is one kernel, ``metal/recurrent_step.metal``; elsewhere it is
the operations that it joins. Gradients are theirs in either case.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from mlx_rgemma.ops import kernels
from mlx_rgemma.ops.conv import causal_conv1d
from mlx_rgemma.ops.elementwise import gated_gelu
from mlx_rgemma.ops.fused import run_fused
from mlx_rgemma.ops.gates import block_diagonal
from mlx_rgemma.ops.kernels import SIMD, ceil_div, sample
from mlx_rgemma.ops.rg_lru import NORMAL, PADDING, RESET, rg_lru

MAX_STEPS = 8
"""Tokens a row of one launch, and rows times tokens of one threadgroup."""

BLOCKS = range(1, 257)
TAPS = range(2, 9)

_ALL_NORMAL = mx.array([NORMAL], mx.uint8)


class RecurrentWeights(NamedTuple):
    """What a recurrent block has learned, beside its projections; any float.

    Attributes:
        conv_weight: (D, K, 1), as mlx-lm stores it. The last tap meets the current token.
        conv_bias: (D,).
        input_weight, recurrent_weight: (heads, D / heads, D / heads), used as ``x @ weight``.
        input_bias, recurrent_bias: (heads, D / heads).
        a_param: (D,). Lambda.
    """

    conv_weight: mx.array
    conv_bias: mx.array
    input_weight: mx.array
    input_bias: mx.array
    recurrent_weight: mx.array
    recurrent_bias: mx.array
    a_param: mx.array


def recurrent_step(
    y_branch: mx.array,
    x_branch: mx.array,
    weights: RecurrentWeights,
    conv_state: mx.array,
    h0: mx.array,
    kind: mx.array | None = None,
) -> tuple[mx.array, mx.array, mx.array]:
    """Convolution, gates, RG-LRU and the gated branch (Griffin, arXiv:2402.19427, section 2.3-2.4).

        out = gelu(y_branch) * RG-LRU(conv(x_branch))

    Meant for one token or a few; `causal_conv1d` and `rg_lru` are for long sequences.

    Args:
        y_branch, x_branch: (B, L, D), any float. The two projections of the block's input.
        weights: The block's other weights.
        conv_state: (B, K-1, D). The inputs of the convolution before the first one, oldest first.
        h0: (B, D), fp32. The state before the first step.
        kind: (1 or B, L), what each step does, from `step_kinds`; None when all are normal. A reset
            starts a document: neither state nor convolution reach back beyond it. Padding comes
            after a row's real tokens and changes no state.

    Returns:
        ``(out, conv_state, h)``: (B, L, D) in the dtype of `x_branch`, the last K-1 real inputs of
        the row's last document (B, K-1, D), and the last state (B, D) in fp32.

    Raises:
        ValueError: If the shapes do not agree.
    """
    if kind is not None and kind.ndim == 1:  # all alike
        kind = None
    _check(y_branch, x_branch, weights, conv_state, h0, kind)
    arrays = [y_branch, x_branch, *weights, conv_state, h0, *([] if kind is None else [kind])]
    batch, steps, _ = x_branch.shape
    taps, block = weights.conv_weight.shape[1], weights.input_weight.shape[1]
    fits = steps <= MAX_STEPS and block in BLOCKS and taps in TAPS
    if fits and STEP.usable(
        x_branch.dtype, weights.input_weight.dtype, block, _rows(batch, steps)[1]
    ):
        out, conv_state, h = run_fused(_launch, _plain, *arrays)
    else:
        out, conv_state, h = _plain(*arrays)
    return out, conv_state, h


def _plain(y_branch, x_branch, *rest, product=block_diagonal):
    weights, (conv_state, h0, *kind) = RecurrentWeights(*rest[:7]), rest[7:]
    reset = mask = segment_pos = lengths = None
    if kind:
        batch, steps, _ = x_branch.shape
        what = mx.broadcast_to(kind[0].astype(mx.uint8), (batch, steps))
        reset, mask = what == RESET, what != PADDING
        lengths = mask.sum(axis=1).astype(mx.int32)
        # Tokens since the last reset; where there is none, more than the convolution looks back.
        last_reset = mx.where(reset, mx.arange(steps), -weights.conv_weight.shape[1])
        segment_pos = mx.arange(steps) - mx.cummax(last_reset, axis=1)
    x, conv_state = causal_conv1d(
        x_branch,
        weights.conv_weight,
        weights.conv_bias,
        conv_state,
        segment_pos=segment_pos,
        lengths=lengths,
    )
    h, h_last = rg_lru(
        x.astype(mx.float32),
        product(x, weights.input_weight),
        product(x, weights.recurrent_weight),
        weights.a_param,
        h0,
        reset=reset,
        mask=mask,
        input_gate_bias=weights.input_bias.flatten(),
        recurrent_gate_bias=weights.recurrent_bias.flatten(),
    )
    return gated_gelu(y_branch, h).astype(x_branch.dtype), conv_state, h_last


def _launch(y_branch, x_branch, *rest):
    weights, (conv_state, h0, *kind) = RecurrentWeights(*rest[:7]), rest[7:]
    batch, steps, width = x_branch.shape
    heads, block, _ = weights.input_weight.shape
    entries, rows = _rows(batch, steps)
    wide = 2 if block > SIMD and weights.input_weight.dtype.size == 2 else 1
    simdgroups = min(16, max(2, block // 16))
    what = kind[0] if kind else _ALL_NORMAL
    kind_row = steps if kind and what.shape[0] > 1 else 0
    return STEP.run(
        [
            y_branch,
            x_branch,
            *weights,
            conv_state,
            h0.astype(mx.float32),
            what,
            mx.array([batch, steps, width, entries, kind_row, len(kind)], mx.int32),
        ],
        [
            (x_branch.shape, x_branch.dtype),
            (conv_state.shape, x_branch.dtype),
            (h0.shape, mx.float32),
        ],
        groups=(heads * ceil_div(block, SIMD * wide), ceil_div(batch, entries), 1),
        threadgroup=(SIMD * simdgroups, 1, 1),
        template={
            "T": x_branch.dtype,
            "BLOCK": block,
            "TAPS": conv_state.shape[1] + 1,
            "ROWS": rows,
            "WIDE": wide,
            "SIMDGROUPS": simdgroups,
        },
    )


def _rows(batch: int, steps: int) -> tuple[int, int]:
    """Batch entries of a threadgroup, and its tokens rounded up to 1, 2, 4 or 8."""
    entries = min(batch, MAX_STEPS // steps)
    return entries, 1 << (entries * steps - 1).bit_length()


def _check(y_branch, x_branch, weights, conv_state, h0, kind) -> None:
    if x_branch.ndim != 3 or x_branch.shape[1] == 0:
        raise ValueError(
            f"[recurrent_step] x_branch must be (B, L, D) with L > 0, not {x_branch.shape}."
        )
    batch, length, width = x_branch.shape
    heads = weights.input_weight.shape[0]
    taps = weights.conv_weight.shape[1]
    block = (heads, width // heads)
    for name, array, shape in (
        ("y_branch", y_branch, x_branch.shape),
        ("conv_weight", weights.conv_weight, (width, taps, 1)),
        ("conv_bias", weights.conv_bias, (width,)),
        ("input_weight", weights.input_weight, (*block, block[1])),
        ("input_bias", weights.input_bias, block),
        ("recurrent_weight", weights.recurrent_weight, (*block, block[1])),
        ("recurrent_bias", weights.recurrent_bias, block),
        ("a_param", weights.a_param, (width,)),
        ("conv_state", conv_state, (batch, taps - 1, width)),
        ("h0", h0, (batch, width)),
        ("kind", kind, (batch, length)),
    ):
        shared = name == "kind" and array is not None and array.shape[0] == 1
        if array is not None and array.shape != ((1, *shape[1:]) if shared else shape):
            raise ValueError(f"[recurrent_step] {name} has shape {array.shape}, expected {shape}.")


def _example(dtype, weight_dtype, block, rows):
    heads, taps = 2, 4
    width = heads * block
    kind = [NORMAL] * rows
    if rows > 2:
        kind[1], kind[-1] = RESET, PADDING

    def eighths(shape, dtype, seed):
        # The convolution's sums of these are exact, and so rounded to 16 bits alike everywhere.
        return (mx.round(sample(shape, mx.float32, seed) * 8.0) / 8.0).astype(dtype)

    def gate(seed):
        weight = sample((heads, block, block), mx.float32, seed) * block**-0.5
        return weight.astype(weight_dtype), sample((heads, block), weight_dtype, seed + 1)

    return (
        sample((1, rows, width), dtype, 1),
        eighths((1, rows, width), dtype, 2),
        eighths((width, taps, 1), weight_dtype, 3),
        eighths((width,), weight_dtype, 4),
        *gate(5),
        *gate(7),
        sample((width,), weight_dtype, 9),
        eighths((1, taps - 1, width), dtype, 10),
        sample((1, width), mx.float32, 11),
        mx.array([kind], mx.uint8),
    )


def _exact(y_branch, x_branch, *rest):
    """The plain form with the gates in fp32: a GPU may round the operands of matrix products."""
    return _plain(y_branch, x_branch, *rest, product=_exact_product)


def _exact_product(x: mx.array, weight: mx.array) -> mx.array:
    heads = x.astype(mx.float32).reshape(*x.shape[:2], *weight.shape[:2], 1)
    return (heads * weight.astype(mx.float32)).sum(axis=-2).reshape(x.shape)


STEP = kernels.register(
    "recurrent_step",
    inputs=(
        "y_branch",
        "x_branch",
        *RecurrentWeights._fields,
        "conv_state",
        "h0",
        "kind",
        "params",
    ),
    outputs=("out", "new_conv_state", "h"),
    launch=_launch,
    reference=_exact,
    example=_example,
    variants=[(dtype, dtype, 256, 1) for dtype in kernels.FLOATS],
)
