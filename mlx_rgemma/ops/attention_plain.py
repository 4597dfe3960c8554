"""Sliding-window attention in plain MLX operations: what the kernels are measured against."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from mlx_rgemma.ops import loops
from mlx_rgemma.ops.attention_cpu import attend
from mlx_rgemma.ops.attention_loops import attend_band
from mlx_rgemma.ops.lanes import lane, worthwhile
from mlx_rgemma.ops.processor import on_linux_cpu
from mlx_rgemma.ops.rotary import apply_rotary

QUERY_BLOCK = 512
"""Queries handled at once: scores take H * QUERY_BLOCK * (QUERY_BLOCK + window) numbers a row."""
CPU_QUERY_BLOCK = 128
"""The same on a Linux CPU, where what a mask hides costs as much as what is seen."""


class Ring(NamedTuple):
    """The last R rotated keys and their values, in a circle.

    Attributes:
        kv: (B, 2, R, head_dim). The keys, then the values.
        head: The slot that the next token goes to; the token d back lies in slot
            ``(head - d) mod R``.
    """

    kv: mx.array
    head: int

    def in_order(self) -> mx.array:
        """(B, 2, R, head_dim), oldest first."""
        if self.head == 0:
            return self.kv
        return mx.concatenate([self.kv[:, :, self.head :], self.kv[:, :, : self.head]], axis=2)

    def newest(self, tokens: int) -> mx.array:
        """The last tokens, (B, 2, tokens, head_dim), oldest first."""
        if tokens <= self.head:
            return self.kv[:, :, self.head - tokens : self.head]
        return self.in_order()[:, :, self.kv.shape[2] - tokens :]

    def appended(self, kv: mx.array) -> Ring:
        """A ring with more tokens, (B, 2, L, head_dim), in place of the oldest.

        At most as many as the ring has slots. Written in place where nobody else holds the array.
        """
        length, slots = kv.shape[2], self.kv.shape[2]
        ring = self.kv[...]  # a handle of its own: what is assigned to it reaches no other
        end = self.head + length
        if end <= slots:
            ring[:, :, self.head : end] = kv
        else:
            ring[:, :, self.head :] = kv[:, :, : slots - self.head]
            ring[:, :, : end - slots] = kv[:, :, slots - self.head :]
        return Ring(ring, end % slots)


def plain_window(
    q: mx.array,
    kv: mx.array,
    ring: Ring | None,
    window: int,
    reach: mx.array | None,
    held: int | None = None,
) -> mx.array:
    """`windowed_attention` on keys and values side by side, (B, 2, L, head_dim).

    The queries are those of the last tokens; there may be fewer.

    Works through blocks of `QUERY_BLOCK` queries, each over the slice of keys that it can see:
    there is no L x L array, and what is held at once does not grow with L.
    """
    length = q.shape[2]
    if ring is not None:
        past = min(ring.kv.shape[2], window if held is None else min(held, window))
        kv = mx.concatenate([ring.newest(past), kv], axis=2)
    before = kv.shape[2] - length

    if loops.worthwhile(q):
        out = attend_band(q, kv, window, reach, q.shape[-1] ** -0.5)
        if out is not None:
            return out

    outputs = []
    block = CPU_QUERY_BLOCK if on_linux_cpu() else QUERY_BLOCK
    shared = worthwhile(q.shape[0] * q.shape[1] * length * block)
    for number, first in enumerate(range(0, length, block)):
        last = min(first + block, length)
        oldest = max(0, before + first - window)
        block_reach = None if reach is None else reach[:, first:last]
        mask = _band(before + first, last - first, oldest, before + last, window, block_reach)
        keys = kv[:, :, oldest : before + last]
        with lane(number if shared else 0):
            outputs.append(_attention(q[:, :, first:last], keys, mask))
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)


def plain_ring(q: mx.array, ring: Ring, window: int, reach: mx.array | None) -> mx.array:
    """`ring_attention`: one query a row over a ring that holds the query's own token."""
    slots = ring.kv.shape[2]
    mask = None
    if reach is not None or slots > window + 1:
        distance = (ring.head - 1 - mx.arange(slots)) % slots
        limit = mx.array(window) if reach is None else reach[:, None, :, None]
        mask = distance <= limit
    return _attention(q, ring.kv, mask)


def _attention(q: mx.array, kv: mx.array, mask: mx.array | str | None) -> mx.array:
    """Softmax attention over keys and values side by side, (B, 2, K, head_dim)."""
    k, v, scale = kv[:, :1], kv[:, 1:], q.shape[-1] ** -0.5
    if not isinstance(mask, str) and on_linux_cpu():
        return attend(q, k, v, scale, mask)
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)


def plain_rotary(
    q: mx.array, k: mx.array, v: mx.array, cos: mx.array, sin: mx.array
) -> tuple[mx.array, mx.array]:
    """The rotated queries, and the rotated keys with their values: (B, 2, L, head_dim)."""
    return apply_rotary(q, cos, sin), mx.concatenate([apply_rotary(k, cos, sin), v], axis=1)


def plain_step(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    cos: mx.array,
    sin: mx.array,
    ring: Ring,
    window: int,
    reach: mx.array | None,
    held: int | None = None,
) -> tuple[mx.array, Ring]:
    """`ring_step`: rotate, put the token into the ring, attend to the ring as it then lies."""
    q, kv = plain_rotary(q, k, v, cos, sin)
    appended = ring.appended(kv)
    if held is not None and held < appended.head:
        # A text that is still short lies in one piece, all of it visible.
        return _attention(q, appended.newest(held + 1), None), appended
    if ring.kv.shape[2] > window:
        read = appended
    else:  # the slot that the token takes is still seen
        read = Ring(mx.concatenate([ring.in_order(), kv], axis=2), 0)
    return plain_ring(q, read, window, reach), appended


def _band(
    first_query: int,
    queries: int,
    first_key: int,
    end_key: int,
    window: int,
    reach: mx.array | None,
) -> mx.array | str | None:
    """Which of the keys each query sees, as a mask for MLX's attention: (1 or B, 1, q, k)."""
    if queries == 1 and reach is None:
        return None
    from_start = first_key == 0 and first_query == 0 and end_key <= window + 1
    if reach is None and from_start and not on_linux_cpu():
        return "causal"
    query = mx.arange(first_query, first_query + queries)[:, None]
    distance = query - mx.arange(first_key, end_key)
    limit = mx.array(window) if reach is None else reach[:, None, :, None]
    return (distance >= 0) & (distance <= limit)
