"""The head, which is the embedding: its logits, and whether a file's head is that."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_rgemma.errors import CheckpointError
from mlx_rgemma.ops import soft_cap

COMPARE_BYTES = 1 << 24
"""Of a head that are compared with the embedding at a time."""


def tied_head(x: mx.array, embedding: nn.Module, cap: float) -> mx.array:
    """Logits by the embedding that the input has too.

    Args:
        x: (..., hidden_size), behind the final norm.
        embedding: Plain or quantized.
        cap: Soft cap of the logits; 0 for none.

    Returns:
        (..., vocab_size), fp32.
    """
    logits = embedding.as_linear(x)
    return soft_cap(logits, mx.array(cap)) if cap else logits.astype(mx.float32)


def check_tied_head(name: str, head: mx.array, embedding: mx.array | None) -> None:
    """Refuse a tensor of a head that differs from the embedding's in dtype, shape or any bit.

    Args:
        name: The tensor's: `lm_head.weight`, and `lm_head.scales` and `.biases` of quantized ones.
        head: The tensor.
        embedding: The same part of the embedding; None if it has none.

    Raises:
        CheckpointError: Naming it.
    """
    same = embedding is not None and (head.shape, head.dtype) == (embedding.shape, embedding.dtype)
    if same and embedding is not None:
        left, right = head.reshape(-1), embedding.reshape(-1)
        step = COMPARE_BYTES // head.itemsize
        same = all(
            mx.array_equal(left[i : i + step].view(mx.uint8), right[i : i + step].view(mx.uint8))
            for i in range(0, head.size, step)
        )
    if not same:
        raise CheckpointError(
            f"{name} differs from model.embed_tokens; RecurrentGemma's head is its embedding, a"
            " model with another head is not supported."
        )
