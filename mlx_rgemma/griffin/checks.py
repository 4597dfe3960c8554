"""Checks that MLX does not make: of integers that become indices, and of the process.

A gather beyond an array's end reads whatever memory lies there, and a scatter writes it. A child
process inherits MLX's locks but not its threads, and would wait forever.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rgemma.errors import UserError, shown

UNCHECKED_TOKENS = 16
"""Tokens per sequence up to which ids are not read on the host: a decode step would wait for the
device."""
MAX_COUNT = 1 << 62
"""Largest count of tokens: sums of it and a length stay within int64."""

KEPT = "[cache] the number of tokens to keep"

_owner: int | None = None  # the process that made the first model


def as_index(what: str, value: Any, end: int) -> int:
    """Return an integer from 0 to `end` - 1.

    Raises:
        ValueError: If it is anything else; the message begins with `what`.
    """
    index = as_count(what, value)
    if index >= end:
        raise ValueError(f"{what} {index} is out of range, expected 0 to {end - 1}.")
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
    """Return token ids on the host as checked integers.

    Raises:
        UserError: Naming the first unknown one.
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
    """Return token ids that are safe to index an embedding with.

    Chunks of more than `UNCHECKED_TOKENS` tokens per sequence are read and checked. Shorter ones,
    and those within `mx.compile`, may not be evaluated yet: an id out of range counts as the last
    of the vocabulary. `check_token_ids` checks ids on the host.

    Args:
        tokens: (B, L), any integer dtype.
        vocab_size: Number of token ids.

    Raises:
        UserError: If the dtype is not an integer, or a chunk holds an unknown id.
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
        UserError: If the dtype is not an integer, or one is negative.
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
    """Return an array's values; None within `mx.compile` and `mx.vmap`, where it has none."""
    try:
        return np.array(array)
    except ValueError:
        return None


def _unknown(value: Any, vocab_size: int) -> UserError:
    return UserError(f"the text holds token {shown(value)}; the model knows 0 to {vocab_size - 1}.")


def refuse_forked_process() -> None:
    """Refuse to run a model in a child that was forked from a process with a model.

    Called where a model is made and wherever one begins to run. No hook is installed: the cost is
    that of `os.getpid`.

    Raises:
        UserError: In such a child.
    """
    global _owner
    if _owner is None:
        _owner = os.getpid()
    elif _owner != os.getpid():
        raise UserError(
            "MLX cannot run in a process that was forked after MLX was used: start it with"
            " 'spawn' (multiprocessing.get_context('spawn')), and load the model in it."
        )
