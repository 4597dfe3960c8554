"""Attention of a chunk on a Linux CPU, by compiled loops between its matrix products.

A query sees one run of keys, so a loop computes the powers of those alone: no mask is made and none
is applied. All heads read the same keys: their queries are the rows of one product. Blocks of
queries are done one after the other, each over the keys that one of them sees, so what is held does
not grow with the chunk.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_rgemma.ops import loops
from mlx_rgemma.ops.exponential import LOG2_E

QUERY_BLOCK = 96
"""Queries handled at once."""


def attend_band(
    q: mx.array, kv: mx.array, window: int, reach: mx.array | None, scale: float
) -> mx.array | None:
    """Softmax attention over one key/value head, of queries that are the last of the keys' tokens.

    Args:
        q: (B, H, L, head_dim), any float.
        kv: (B, 2, K, head_dim), keys and values; K >= L.
        window: How many tokens a query sees beside its own, number K - L + l, at most.
        reach: (1 or B, L), int32. The same for each query; None for the window.
        scale: Of the products of queries and keys.

    Returns:
        (B, H, L, head_dim), dtype of `q`; None where arrays have no values.
    """
    batch, heads, length, dim = q.shape
    reach = mx.full((1, length), window, mx.int32) if reach is None else reach
    ready = loops.ready(q.astype(mx.float32) * (scale * LOG2_E), kv, reach)
    if ready is None:
        return None
    scaled, kv, reach = ready
    k, v = kv[:, 0], kv[:, 1]
    own = np.arange(k.shape[1] - length, k.shape[1])
    before = np.minimum(np.asarray(reach), window).astype(np.int64)
    low = np.broadcast_to(np.maximum(own - before, 0), (batch, length))

    found = []
    for first in range(0, length, QUERY_BLOCK):
        some = slice(first, min(first + QUERY_BLOCK, length))
        oldest, end = int(low[:, some].min()), int(own[some][-1]) + 1
        rows = scaled[:, :, some].reshape(batch, -1, dim)
        scores = rows @ k[:, oldest:end].swapaxes(1, 2)
        totals = np.empty(batch * rows.shape[1], np.float32)
        begin, behind = low[:, some] - oldest, own[some] + 1 - oldest
        by_head = scores.reshape(batch, heads, -1, end - oldest)
        loops.run("softmax", totals.size, by_head, begin, behind, totals)  # changes the scores
        sums = (scores @ v[:, oldest:end]) / mx.array(totals).reshape(batch, -1, 1)
        out = sums.reshape(batch, heads, -1, dim).astype(q.dtype)
        mx.eval(out)
        found.append(out)
    return mx.concatenate(found, axis=2)
