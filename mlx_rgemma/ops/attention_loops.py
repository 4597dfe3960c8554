"""Attention of a chunk on a Linux CPU, by a compiled loop.

A query sees one run of keys, and the loop computes the scores of little more than that: no mask is
made, and no score is ever in memory outside a core's caches. What it holds does not grow with the
chunk.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_rgemma.ops import loops
from mlx_rgemma.ops.exponential import LOG2_E

CHANNELS = 32
"""Heads are widened to a multiple of it: of the columns of a tile, on any processor."""


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
    ready = loops.ready(_widened(q), _widened(kv), reach)
    if ready is None:
        return None
    own = np.arange(kv.shape[2] - length, kv.shape[2])
    before = np.minimum(np.asarray(ready[2]), window)
    low = np.broadcast_to(np.maximum(own - before, 0), (batch, length)).astype(np.int32)
    out = np.empty((batch, length, heads, ready[0].shape[-1]), np.float32)
    units = batch * heads * -(-length // loops.constant("QUERIES"))
    loops.run("band_attention", units, *ready[:2], low, np.float32(scale * LOG2_E), out)
    return mx.array(out[..., :dim]).swapaxes(1, 2).astype(q.dtype)


def _widened(x: mx.array) -> mx.array:
    missing = -x.shape[-1] % CHANNELS
    return mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x
