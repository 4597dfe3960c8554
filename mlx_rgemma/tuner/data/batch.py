"""What one training step reads."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True)
class Batch:
    """Rows of tokens, each with the tokens that are to be predicted.

    Attributes:
        tokens: (B, L), int32. What the model reads.
        targets: (B, L), int32. The token after each.
        mask: (B, L), bool. Which targets count.
        segment_pos: (B, L), int32. Position of each token in its document: 0 wherever a document
            (or a piece of one, or a row's padding) begins. None: every row is one document, from
            its beginning; padding behind it needs no positions.
    """

    tokens: mx.array
    targets: mx.array
    mask: mx.array
    segment_pos: mx.array | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, and tokens in each."""
        rows, length = self.tokens.shape
        return rows, length

    def share(self, rank: int, size: int) -> Batch:
        """The rows that one of `size` processes takes: every `size`-th.

        Raises:
            ValueError: If there are fewer rows than processes.
        """
        if self.shape[0] < size:
            raise ValueError(f"[batch] {self.shape[0]} rows cannot be shared by {size} processes.")
        if size == 1:
            return self
        rows = slice(rank, None, size)
        positions = None if self.segment_pos is None else self.segment_pos[rows]
        return Batch(self.tokens[rows], self.targets[rows], self.mask[rows], positions)
