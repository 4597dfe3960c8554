"""A KV cache of constant size: the last R tokens in a ring."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx


class RingBuffer(NamedTuple):
    """The last R rotated keys and their values.

    Attributes:
        kv: (B, 2, R, head_dim). The keys, then the values.
        write_pos: The slot of the next token; the token d back is in slot
            ``(write_pos - d) mod R``.
    """

    kv: mx.array
    write_pos: int

    def in_order(self) -> mx.array:
        """Return (B, 2, R, head_dim), oldest first."""
        if self.write_pos == 0:
            return self.kv
        old, new = self.kv[:, :, self.write_pos :], self.kv[:, :, : self.write_pos]
        return mx.concatenate([old, new], axis=2)

    def newest(self, tokens: int) -> mx.array:
        """Return the last tokens, (B, 2, tokens, head_dim), oldest first."""
        if tokens <= self.write_pos:
            return self.kv[:, :, self.write_pos - tokens : self.write_pos]
        return self.in_order()[:, :, self.kv.shape[2] - tokens :]

    def appended(self, kv: mx.array) -> RingBuffer:
        """Return a ring with more tokens, (B, 2, L, head_dim), in place of the oldest.

        At most as many as the ring has slots. Written in place if nothing else holds the array.
        """
        length, slots = kv.shape[2], self.kv.shape[2]
        ring = self.kv[...]  # a handle of its own: assigning to it changes no other
        end = self.write_pos + length
        if end <= slots:
            ring[:, :, self.write_pos : end] = kv
        else:
            ring[:, :, self.write_pos :] = kv[:, :, : slots - self.write_pos]
            ring[:, :, : end - slots] = kv[:, :, slots - self.write_pos :]
        return RingBuffer(ring, end % slots)
