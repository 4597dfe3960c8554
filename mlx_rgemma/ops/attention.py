"""Sliding-window attention with one key/value head, over a ring of past keys and a chunk.

One rule says what a query sees: a key lies ``d`` tokens back, and is visible if
``0 <= d <= reach``, where ``reach`` is the smaller of the window and the query's position in its
document. Window, document borders and slots of the ring never written are all that one rule.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

QUERY_BLOCK = 512
"""Queries handled at once: scores take H * QUERY_BLOCK * (QUERY_BLOCK + window) numbers a row."""


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


def windowed_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    window: int,
    reach: mx.array | None = None,
    ring: Ring | None = None,
) -> mx.array:
    """Attention of a chunk of queries over the chunk and the keys before it.

    Works through blocks of `QUERY_BLOCK` queries, each over the slice of keys that it can see:
    there is no L x L array, and what is held at once does not grow with L.

    Args:
        q: (B, H, L, head_dim), any float, rotated.
        k, v: (B, 1, L, head_dim); k rotated.
        window: How many past tokens a query sees beside its own.
        reach: (B, L), int32. ``min(window, position in the document)``; None when no document
            starts inside the chunk and the ring (if any) is full.
        ring: The tokens before the chunk; None at the start of a sequence.

    Returns:
        (B, H, L, head_dim), dtype of `q`. The softmax is computed in fp32.

    Raises:
        ValueError: If the shapes do not agree.
    """
    batch, _, length, head_dim = q.shape
    if k.shape != (batch, 1, length, head_dim) or v.shape != k.shape:
        raise ValueError(
            f"[windowed_attention] q has shape {q.shape}, k {k.shape}, v {v.shape};"
            " k and v must have one head and the rest of q's shape."
        )
    past = 0
    if ring is not None:
        slots = ring.kv.shape[2]
        past = min(slots, window)
        kv = ring.in_order()[:, :, slots - past :]
        k = mx.concatenate([kv[:, :1], k], axis=2)
        v = mx.concatenate([kv[:, 1:], v], axis=2)

    outputs = []
    for first in range(0, length, QUERY_BLOCK):
        last = min(first + QUERY_BLOCK, length)
        oldest = max(0, past + first - window)
        block_reach = None if reach is None else reach[:, first:last]
        mask = _band(past + first, last - first, oldest, past + last, window, block_reach)
        outputs.append(
            mx.fast.scaled_dot_product_attention(
                q[:, :, first:last],
                k[:, :, oldest : past + last],
                v[:, :, oldest : past + last],
                scale=head_dim**-0.5,
                mask=mask,
            )
        )
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)


def ring_attention(
    q: mx.array, ring: Ring, *, window: int, reach: mx.array | None = None
) -> mx.array:
    """Attention of one query a row over a ring that already holds the query's own token.

    Keys carry their rotation, so their order does not matter: the ring is read as it lies.

    Args:
        q: (B, H, 1, head_dim), any float, rotated.
        ring: The window, the newest token in slot ``head - 1``.
        window: How many past tokens a query sees beside its own.
        reach: (B, 1), int32. ``min(window, position)``; None when every slot is visible.

    Returns:
        (B, H, 1, head_dim), dtype of `q`.
    """
    slots = ring.kv.shape[2]
    mask = None
    if reach is not None or slots > window + 1:
        distance = (ring.head - 1 - mx.arange(slots)) % slots
        limit = mx.array(window) if reach is None else reach[:, None, :, None]
        mask = distance <= limit
    return mx.fast.scaled_dot_product_attention(
        q, ring.kv[:, :1], ring.kv[:, 1:], scale=q.shape[-1] ** -0.5, mask=mask
    )


def _band(
    first_query: int,
    queries: int,
    first_key: int,
    end_key: int,
    window: int,
    reach: mx.array | None,
) -> mx.array | str | None:
    """Which of the keys each query sees, as a mask for MLX's attention: (B or 1, 1, q, k)."""
    if reach is None and first_key == 0 and first_query == 0 and end_key <= window + 1:
        return "causal" if queries > 1 else None
    query = mx.arange(first_query, first_query + queries)[:, None]
    distance = query - mx.arange(first_key, end_key)
    limit = mx.array(window) if reach is None else reach[:, None, :, None]
    return (distance >= 0) & (distance <= limit)
