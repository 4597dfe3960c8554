"""Positions, document boundaries and padding of one call, computed once for all layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from mlx_rgemma.griffin.cache import GriffinCache
from mlx_rgemma.griffin.checks import check_segment_pos
from mlx_rgemma.ops import MAX_STEPS, rotary_angles, token_types


class SequenceInfo:
    """Positions, document boundaries and padding of the tokens of one call, (B, L).

    Attributes:
        cos, sin: (1 or B, 1, L, rotary_dims / 2), fp32. Angles of the rotary embedding.
        max_lookback: (B, L), int32. Past keys that each query sees; None if the window or the
            number of past tokens is the limit.
        cached_len: ``min(window, position)`` of the first token, if it is the same for all
            sequences.
        reset: (1 or B, L), bool. True where a document starts; None when none does.
        segment_pos: (B, L), int64, of the caller; None when documents continue.
        lengths: (B,), int32. Tokens of each sequence without padding; None without any.
        mask: (B, L), bool. False on padding; None without any.
        fresh: Whether the cache is empty.
        is_decode: Whether each sequence continues by one token.
        is_short: Whether `recurrent_decode` handles the call in one launch.
        token_type: For `recurrent_decode`; None if all tokens are normal.
        next_positions: Position of each sequence's next token, if the caller gave positions.
    """

    def __init__(
        self,
        batch_size: int,
        length: int,
        cache: Sequence[GriffinCache] | None,
        segment_pos: mx.array | None,
        window: int,
        frequencies: mx.array,
    ) -> None:
        start = [0] * batch_size if cache is None else cache[0].positions
        valid = None if cache is None else cache[0].valid(length)
        self.fresh = not any(start)
        self.segment_pos = None
        self.cached_len = None
        self.next_positions: list[int] | None = None
        if segment_pos is not None:
            positions = check_segment_pos(segment_pos)
            self.segment_pos = positions
            self.reset: mx.array | None = positions == 0
            self.max_lookback: mx.array | None = mx.minimum(positions, window).astype(mx.int32)
            if cache is not None:
                self.next_positions = self._after(segment_pos, start, valid)
        else:
            starts = start[:1] if len(set(start)) == 1 else start
            positions = mx.array(starts, mx.int64)[:, None] + mx.arange(length, dtype=mx.int64)
            self.reset = None if min(start) > 0 else positions == 0
            self.max_lookback = None
            self.cached_len = min(start[0], window) if len(starts) == 1 else None
            if not self.fresh and min(start) < window:
                max_lookback = mx.minimum(positions, window).astype(mx.int32)
                self.max_lookback = mx.broadcast_to(max_lookback, (batch_size, length))
        self.cos, self.sin = rotary_angles(positions, frequencies)
        self.lengths = None if valid is None else mx.array(valid, mx.int32)
        self.mask = None if self.lengths is None else mx.arange(length) < self.lengths[:, None]
        self.is_short = length <= MAX_STEPS
        special = self.reset is not None or self.mask is not None
        self.token_type = token_types(self.reset, self.mask) if self.is_short and special else None
        self.is_decode = length == 1 and not self.fresh and valid is None

    @staticmethod
    def _after(segment_pos: mx.array, start: list[int], valid: list[int] | None) -> list[int]:
        """Return the position after each sequence's last token that is no padding."""
        sequences: Any = segment_pos.tolist()
        if valid is None:
            return [positions[-1] + 1 for positions in sequences]
        return [
            positions[n - 1] + 1 if n else before
            for positions, n, before in zip(sequences, valid, start, strict=True)
        ]
