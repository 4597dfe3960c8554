"""Numbers that become indices of MLX, which checks none of them itself.

A gather beyond an array's end reads, and a scatter writes, whatever memory lies there.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rgemma.errors import UserError, shown

UNCHECKED_TOKENS = 16
"""Tokens per sequence up to which ids are not read: to read a decode step's would wait for the
device, which is to compute the next one meanwhile."""
MAX_COUNT = 1 << 62
"""Of tokens: what is added to it stays within int64."""

KEPT = "[cache] the number of tokens to keep"


def as_index(what: str, value: Any, end: int) -> int:
    """Return an integer from 0 to `end` - 1.

    Raises:
        ValueError: If it is anything else; the message begins with `what`.
    """
    index = as_count(what, value)
    if index >= end:
        raise ValueError(f"{what} {index} of {end}: there is no such one.")
    return index


def as_count(what: str, value: Any) -> int:
    """Return an integer from 0 to `MAX_COUNT`.

    Raises:
        ValueError: If it is anything else; the message begins with `what`.
    """
    try:
        count = operator.index(value)
    except (TypeError, ValueError):
        count = -1
    if isinstance(value, bool) or not 0 <= count <= MAX_COUNT:
        raise ValueError(f"{what} is {shown(value)}, expected an integer from 0.")
    return count


def as_list(values: Any) -> list[Any]:
    """Return the values of an array or sequence on the host."""
    found: Any = values.tolist() if isinstance(values, mx.array | np.ndarray) else list(values)
    return found if isinstance(found, list) else [found]


def read_counts(array: mx.array, size: int) -> list[int]:
    """Return the integers of an array that holds `size` of them, from 0 to `MAX_COUNT`.

    Raises:
        ValueError: If it holds anything else.
    """
    if array.shape != (size,) or not mx.issubdtype(array.dtype, mx.integer):
        raise ValueError(f"not {size} integers")
    values: Any = array.tolist()
    if min(values) < 0 or max(values) > MAX_COUNT:
        raise ValueError("not a count")
    return values


def check_token_ids(values: Iterable[Any], vocab_size: int) -> list[int]:
    """Return token ids that are on the host as integers that a model knows.

    Raises:
        UserError: Naming the first one that is not.
    """
    tokens = []
    for value in values:
        try:
            token = operator.index(value)
        except TypeError:
            token = -1
        if isinstance(value, bool) or not 0 <= token < vocab_size:
            raise _unknown(value, vocab_size)
        tokens.append(token)
    return tokens


def safe_token_ids(tokens: mx.array, vocab_size: int) -> mx.array:
    """Return token ids that an embedding can be indexed with, whatever they are.

    Chunks of more than `UNCHECKED_TOKENS` tokens per sequence are read and checked. Shorter ones,
    and those within `mx.compile`, may not be there yet: an id out of range is taken as the last of
    the vocabulary. Ids that come from the host are for `check_token_ids`.

    Args:
        tokens: (B, L), any integer dtype.
        vocab_size: Number of token ids.

    Raises:
        UserError: If the dtype is no integer, or a chunk holds an unknown id.
    """
    if not mx.issubdtype(tokens.dtype, mx.integer):
        raise UserError(f"[model] tokens are {tokens.dtype}, expected integers.")
    if tokens.shape[-1] > UNCHECKED_TOKENS:
        values = _on_host(tokens)
        if values is not None:
            for value in (values.min(), values.max()):
                if not 0 <= value < vocab_size:
                    raise _unknown(int(value), vocab_size)
            return tokens
    if tokens.itemsize < 4:
        tokens = tokens.astype(mx.int32)
    # As unsigned numbers, negative ones are the largest: one operation bounds both ends.
    unsigned = mx.uint32 if tokens.itemsize == 4 else mx.uint64
    if tokens.dtype != unsigned:
        tokens = tokens.view(unsigned)
    return mx.minimum(tokens, vocab_size - 1)


def check_segment_pos(segment_pos: mx.array) -> mx.array:
    """Return positions as int64, none of them negative.

    Within `mx.compile`, where they cannot be read, a negative one counts as 0.

    Raises:
        UserError: If the dtype is no integer, or one is negative.
    """
    if not mx.issubdtype(segment_pos.dtype, mx.integer):
        raise UserError(f"[model] segment_pos is {segment_pos.dtype}, expected integers.")
    values = _on_host(segment_pos)
    if values is None:
        return mx.maximum(segment_pos.astype(mx.int64), 0)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > MAX_COUNT:
        raise UserError(
            f"[model] segment_pos holds {low if low < 0 else high}, expected 0 to {MAX_COUNT}."
        )
    return segment_pos.astype(mx.int64)


def _on_host(array: mx.array) -> Any:
    """An array's values; None where it has none, within `mx.compile` and `mx.vmap`."""
    try:
        return np.array(array)
    except ValueError:
        return None


def _unknown(value: Any, vocab_size: int) -> UserError:
    return UserError(f"the text holds token {shown(value)}; the model knows 0 to {vocab_size - 1}.")
