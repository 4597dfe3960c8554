"""Where the tokens of one call stand: computed once, read by every layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from mlx_rgemma.griffin.cache import GriffinCache
from mlx_rgemma.griffin.indices import check_segment_pos
from mlx_rgemma.ops import MAX_STEPS, rotary_angles, step_kinds


class TokenLayout:
    """Positions, document borders and padding of the tokens of one call, (B, L).

    Attributes:
        cos, sin: (1 or B, 1, L, rotary_dims / 2), fp32. Angles of the rotary embedding.
        reach: (B, L), int32. How many past keys each query sees; None when that is the window,
            or as many as there are.
        held: ``min(window, position)`` of the first token, where every row stands at the same one.
        reset: (1 or B, L), bool. True where a document starts; None when none does.
        segment_pos: (B, L), int64, as the caller gave it; None when documents go on.
        lengths: (B,), int32. Real tokens of each row, before padding; None when all are.
        mask: (B, L), bool. False on padding; None when there is none.
        fresh: Whether nothing came before these tokens.
        one_step: Whether each row continues by one token.
        few_steps: Whether the tokens are so few that the recurrent block takes them in one launch.
        kind: What each of a few steps does, for `recurrent_step`; None when all just go on.
        next_positions: Position of each row's next token, where the caller gave positions.
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
        self.held = None
        self.next_positions: list[int] | None = None
        if segment_pos is not None:
            positions = check_segment_pos(segment_pos)
            self.segment_pos = positions
            self.reset: mx.array | None = positions == 0
            self.reach: mx.array | None = mx.minimum(positions, window).astype(mx.int32)
            if cache is not None:
                self.next_positions = self._after(segment_pos, start, valid)
        else:
            rows = start[:1] if len(set(start)) == 1 else start
            positions = mx.array(rows, mx.int64)[:, None] + mx.arange(length, dtype=mx.int64)
            self.reset = None if min(start) > 0 else positions == 0
            self.reach = None
            self.held = min(start[0], window) if len(rows) == 1 else None
            if not self.fresh and min(start) < window:
                reach = mx.minimum(positions, window).astype(mx.int32)
                self.reach = mx.broadcast_to(reach, (batch_size, length))
        self.cos, self.sin = rotary_angles(positions, frequencies)
        self.lengths = None if valid is None else mx.array(valid, mx.int32)
        self.mask = None if self.lengths is None else mx.arange(length) < self.lengths[:, None]
        self.few_steps = length <= MAX_STEPS
        borders = self.reset is not None or self.mask is not None
        self.kind = step_kinds(self.reset, self.mask) if self.few_steps and borders else None
        self.one_step = length == 1 and not self.fresh and valid is None

    @staticmethod
    def _after(segment_pos: mx.array, start: list[int], valid: list[int] | None) -> list[int]:
        """Position of the token after each row's last real one."""
        rows: Any = segment_pos.tolist()
        if valid is None:
            return [row[-1] + 1 for row in rows]
        return [
            row[n - 1] + 1 if n else before
            for row, n, before in zip(rows, valid, start, strict=True)
        ]
