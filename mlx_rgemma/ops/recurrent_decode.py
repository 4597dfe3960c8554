"""The decode step of Griffin's recurrent block between its projections, in one launch.

Kernel: ``metal/recurrent_decode.metal``, for at most `MAX_STEPS` tokens per sequence, gate blocks
of up to 256 channels and a convolution of 2 to 8 taps. The reference is the operations that it
joins; gradients are theirs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx

from mlx_rgemma.ops import metal
from mlx_rgemma.ops.activations import gated_gelu
from mlx_rgemma.ops.backend import Backend, Operation
from mlx_rgemma.ops.causal_conv1d import causal_conv1d
from mlx_rgemma.ops.linear import block_diagonal
from mlx_rgemma.ops.metal import SIMD, MetalKernel, ceil_div, sample
from mlx_rgemma.ops.rg_lru import ALL_NORMAL, TokenType, rg_lru

MAX_STEPS = 8
"""Tokens per sequence of one launch, and sequences times tokens of one threadgroup."""

BLOCKS = range(1, 257)
TAPS = range(2, 9)


class RecurrentWeights(NamedTuple):
    """The parameters of a recurrent block other than its projections; any float.

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


def recurrent_decode(
    y_branch: mx.array,
    x_branch: mx.array,
    weights: RecurrentWeights,
    conv_state: mx.array,
    h0: mx.array,
    token_type: mx.array | None = None,
) -> tuple[mx.array, mx.array, mx.array]:
    """Convolution, gates, RG-LRU and the gated branch (Griffin, arXiv:2402.19427, section 2.3-2.4).

        out = gelu(y_branch) * RG-LRU(conv(x_branch))

    Meant for one token or a few; `causal_conv1d` and `rg_lru` are for long sequences.

    Args:
        y_branch, x_branch: (B, L, D), any float. The two projections of the block's input.
        weights: The block's other weights.
        conv_state: (B, K-1, D). The inputs of the convolution before the first one, oldest first.
        h0: (B, D), fp32. The state before the first step.
        token_type: (1 or B, L), from `token_types`; None when all are normal. A reset starts a
            document: neither state nor convolution reach back beyond it. Padding comes after a
            sequence's real tokens and changes no state.

    Returns:
        ``(out, conv_state, h)``: (B, L, D) in the dtype of `x_branch`, the last K-1 real inputs of
        the sequence's last document (B, K-1, D), and the last state (B, D) in fp32.

    Raises:
        ValueError: If the shapes do not agree.
    """
    if token_type is not None and token_type.ndim == 1:  # all alike
        token_type = None
    _check(y_branch, x_branch, weights, conv_state, h0, token_type)
    out, conv_state, h = RECURRENT_DECODE(y_branch, x_branch, *weights, conv_state, h0, token_type)
    return out, conv_state, h


def reference(
    y_branch: mx.array, x_branch: mx.array, *rest: Any, gate: Any = block_diagonal
) -> tuple[mx.array, mx.array, mx.array]:
    """`recurrent_decode` out of the operations that it joins; `gate` multiplies with the gates."""
    weights, (conv_state, h0, token_type) = RecurrentWeights(*rest[:7]), rest[7:]
    reset = mask = segment_pos = lengths = None
    if token_type is not None:
        batch, steps, _ = x_branch.shape
        types = mx.broadcast_to(token_type.astype(mx.uint8), (batch, steps))
        reset, mask = types == TokenType.RESET, types != TokenType.PADDING
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
        gate(x, weights.input_weight),
        gate(x, weights.recurrent_weight),
        weights.a_param,
        h0,
        reset=reset,
        mask=mask,
        input_gate_bias=weights.input_bias.flatten(),
        recurrent_gate_bias=weights.recurrent_bias.flatten(),
    )
    return gated_gelu(y_branch, h).astype(x_branch.dtype), conv_state, h_last


RECURRENT_DECODE = Operation(reference)


# The Metal kernel.


def _supports(y_branch: mx.array, x_branch: mx.array, *rest: Any) -> bool:
    weights = RecurrentWeights(*rest[:7])
    batch, steps, _ = x_branch.shape
    taps, block = weights.conv_weight.shape[1], weights.input_weight.shape[1]
    if steps > MAX_STEPS or block not in BLOCKS or taps not in TAPS:
        return False
    variant = x_branch.dtype, weights.input_weight.dtype, block, _rows(batch, steps)[1]
    return KERNEL.validated(*variant)


@RECURRENT_DECODE.implementation(Backend.METAL, supports=_supports)
def _metal(*arrays: Any) -> Any:
    return tuple(_launch(*arrays))


def _launch(y_branch: mx.array, x_branch: mx.array, *rest: Any) -> Any:
    weights, (conv_state, h0, token_type) = RecurrentWeights(*rest[:7]), rest[7:]
    batch, steps, width = x_branch.shape
    heads, block, _ = weights.input_weight.shape
    entries, rows = _rows(batch, steps)
    wide = 2 if block > SIMD and weights.input_weight.dtype.size == 2 else 1
    simdgroups = min(16, max(2, block // 16))
    given = token_type is not None
    types = token_type if given else ALL_NORMAL
    type_row = steps if given and types.shape[0] > 1 else 0
    return KERNEL.run(
        [
            y_branch,
            x_branch,
            *weights,
            conv_state,
            h0.astype(mx.float32),
            types,
            mx.array([batch, steps, width, entries, type_row, int(given)], mx.int32),
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
    """Return batch entries of a threadgroup, and its tokens rounded up to 1, 2, 4 or 8."""
    entries = min(batch, MAX_STEPS // steps)
    return entries, 1 << (entries * steps - 1).bit_length()


def _check(
    y_branch: mx.array,
    x_branch: mx.array,
    weights: Any,
    conv_state: mx.array,
    h0: mx.array,
    token_type: mx.array | None,
) -> None:
    if x_branch.ndim != 3 or x_branch.shape[1] == 0:
        raise ValueError(
            f"[recurrent_decode] x_branch must be (B, L, D) with L > 0, not {x_branch.shape}."
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
        ("token_type", token_type, (batch, length)),
    ):
        shared = name == "token_type" and array is not None and array.shape[0] == 1
        if array is not None and array.shape != ((1, *shape[1:]) if shared else shape):
            raise ValueError(
                f"[recurrent_decode] {name} has shape {array.shape}, expected {shape}."
            )


def _sample_inputs(
    dtype: mx.Dtype, weight_dtype: mx.Dtype, block: int, rows: int
) -> tuple[Any, ...]:
    heads, taps = 2, 4
    width = heads * block
    types = [TokenType.NORMAL] * rows
    if rows > 2:
        types[1], types[-1] = TokenType.RESET, TokenType.PADDING

    def eighths(shape: tuple[int, ...], dtype: mx.Dtype, seed: int) -> mx.array:
        # The convolution's sums of these are exact, and so rounded to 16 bits alike everywhere.
        return (mx.round(sample(shape, mx.float32, seed) * 8.0) / 8.0).astype(dtype)

    def gate(seed: int) -> tuple[mx.array, mx.array]:
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
        mx.array([types], mx.uint8),
    )


def _exact_reference(*arrays: Any) -> Any:
    """The reference with the gates in fp32: a GPU may round the operands of matrix products."""
    return reference(*arrays, gate=_exact_gate)


def _exact_gate(x: mx.array, weight: mx.array) -> mx.array:
    heads = x.astype(mx.float32).reshape(*x.shape[:2], *weight.shape[:2], 1)
    return (heads * weight.astype(mx.float32)).sum(axis=-2).reshape(x.shape)


KERNEL = MetalKernel(
    "recurrent_decode",
    inputs=(
        "y_branch",
        "x_branch",
        *RecurrentWeights._fields,
        "conv_state",
        "h0",
        "token_type",
        "params",
    ),
    outputs=("out", "new_conv_state", "h"),
    launch=_launch,
    reference=_exact_reference,
    sample_inputs=_sample_inputs,
    variants=[(dtype, dtype, 256, 1) for dtype in metal.FLOATS],
)
