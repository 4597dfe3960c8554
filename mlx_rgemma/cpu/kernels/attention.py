"""Attention (FlashAttention, arXiv:2205.14135, algorithm 1) of a chunk and of a decode step.

Keys are processed in blocks, whose scores stay in the caches. Scores of one key are adjacent, so
that several queries are computed at a time and no vector is reduced.
"""

from __future__ import annotations

import numpy as np

from mlx_rgemma.cpu.kernels.compiler import kernel
from mlx_rgemma.cpu.kernels.functions import LOG2_E, ONE, ZERO, dot, exp2, f32, i32
from mlx_rgemma.cpu.kernels.tiles import (
    COLUMNS,
    LANES,
    NARROW_ROWS,
    ROWS,
    WIDE,
    add_narrow_tile_product,
    add_tile_product,
    narrow_tile_product,
    prefetch,
    tile_product,
)

QUERIES, KEYS = (64, 128) if WIDE else (48, 96)
"""Size of a block of scores: whole tiles, which stay in L2 with their queries, keys and values."""
MASK_VALUE, LOWEST = f32(-2e30), f32(-1e30)


@kernel
def _apply_mask(scores, key, low, own):
    """Mask a block of scores, whose first key has index `key`."""
    for i in range(scores.shape[0]):
        row, at = scores[i], i32(key + i)
        for r in range(QUERIES):
            seen = (at >= low[r]) & (at <= own[r])
            row[r] = row[r] if seen else MASK_VALUE


@kernel
def _update_row_max(row_max, scores):
    """row_max: (QUERIES,), the maxima so far; scores: (n, QUERIES)."""
    for i in range(scores.shape[0]):
        row = scores[i]
        for r in range(QUERIES):
            row_max[r] = max(row_max[r], row[r])


@kernel
def _exp_and_sum(scores, before, row_max, row_sum, scale_factor, block_sum):
    """Replace scores, in base 2, by exponentials relative to the row maximum, and sum them.

    before, row_max: the maximum before this block, and now; scale_factor: what the accumulators so
    far are to be multiplied by; block_sum: space for the sum of this block, which is added to the
    others as one, so that rounding does not grow with the keys. All but scores (QUERIES,).
    """
    block_sum[:] = ZERO
    for i in range(scores.shape[0]):
        row = scores[i]
        for r in range(QUERIES):
            power = exp2(row[r] - row_max[r])
            row[r] = power
            block_sum[r] += power
    for r in range(QUERIES):
        scale_factor[r] = exp2(before[r] - row_max[r])
        row_sum[r] = row_sum[r] * scale_factor[r] + block_sum[r]


@kernel
def _rescale(acc, factors):
    """Multiply each row by its factor."""
    for r in range(acc.shape[0]):
        row, factor = acc[r], factors[r]
        if factor != ONE:
            for d in range(row.size):
                row[d] *= factor


@kernel
def round_up(number, of):
    """The next multiple."""
    return (number + of - 1) // of * of


@kernel
def sliding_window_attention(first, last, q, kv, low, scale, out):
    """Softmax attention of queries that are the last of the keys' tokens.

    q: (B, H, L, N), N a multiple of COLUMNS; kv: (B, 2, K, N); low: (B, L) int32, the oldest key
    that a query sees; scale: of scores in base 2; out: (B, L, H, N). Work
    items: blocks of queries of a head, early ones (which see less) alternating with late ones.
    """
    heads, length, dim = q.shape[1:]
    blocks, past = (length + QUERIES - 1) // QUERIES, kv.shape[2] - length
    queries = np.empty((dim, QUERIES), np.float32)
    scores = np.empty((KEYS, QUERIES), np.float32)
    acc = np.empty((QUERIES, dim), np.float32)
    lows, own = np.empty(QUERIES, np.int32), np.empty(QUERIES, np.int32)
    of_queries = np.empty((5, QUERIES), np.float32)
    before, row_max = of_queries[0], of_queries[1]
    row_sum, scale_factor, block_sum = of_queries[2], of_queries[3], of_queries[4]
    for unit in range(first, last):
        turn, head, b = unit % blocks, unit // blocks % heads, unit // (blocks * heads)
        start = (blocks - 1 - turn // 2 if turn % 2 else turn // 2) * QUERIES
        rows = min(QUERIES, length - start)
        for r in range(QUERIES):  # those behind the end do as the last, and are not written
            query = start + min(r, rows - 1)
            lows[r], own[r] = low[b, query], past + query
            one = q[b, head, query]
            for d in range(dim):
                queries[d, r] = one[d] * scale
        row_max[:] = LOWEST
        row_sum[:] = ZERO
        acc[:] = ZERO

        end = own[rows - 1] + 1
        key, last_low = lows.min(), lows.max()
        while key < end:
            size = min(KEYS, end - key)
            keys, values = kv[b, 0, key:], kv[b, 1, key : key + size]
            if keys.shape[0] < round_up(size, ROWS):  # the last tile wants more
                keys = np.zeros((KEYS, dim), np.float32)
                keys[:size] = kv[b, 0, key : key + size]
            block = scores[:size]
            for i in range(0, size, ROWS):
                for c in range(0, QUERIES, COLUMNS):
                    tile_product(keys[i : i + ROWS], queries[:, c:], scores[i:, c:])
            if key < last_low or key + size > own[0] + 1:
                _apply_mask(block, key, lows, own)
            before[:] = row_max
            _update_row_max(row_max, block)
            _exp_and_sum(block, before, row_max, row_sum, scale_factor, block_sum)
            _rescale(acc, scale_factor)
            for r in range(0, QUERIES, ROWS):
                for c in range(0, dim, COLUMNS):
                    add_tile_product(block[:, r:], values[:, c:], acc[r:, c:])
            key += size

        for r in range(rows):
            into, row, share = out[b, start + r, head], acc[r], ONE / row_sum[r]
            for d in range(dim):
                into[d] = row[d] * share


@kernel
def flash_decode_split(part, parts, q, keys, values, begin, seen, scale, row_max, row_sum, acc):
    """A part of the attention of one token over the tokens before it, which lie in a ring.

    q: (H, N); keys, values: (slots, N), of which `seen` are visible, the last of them before slot
    `begin`; row_max, row_sum: (H,), the highest score, in base 2, and the sum of the exponentials;
    acc: (H, N).

    `LANES` heads at a time, whose scores are adjacent; several keys make a row of
    `QUERIES`.
    """
    heads, dim = acc.shape
    groups, columns = round_up(heads, LANES) // LANES, round_up(dim, LANES)
    queries = np.zeros((dim, groups * LANES), np.float32)
    for n in range(heads):
        for d in range(dim):
            queries[d, n] = q[n, d] * (scale * LOG2_E)
    scores = np.empty((KEYS, LANES), np.float32)
    into = np.zeros((groups * LANES, columns), np.float32)
    row_maxes = np.empty((groups, QUERIES), np.float32)
    row_sums = np.zeros((groups, QUERIES), np.float32)
    before, scale_factor = np.empty(QUERIES, np.float32), np.empty(QUERIES, np.float32)
    block_sum = np.empty(QUERIES, np.float32)
    row_maxes[:] = LOWEST
    one = min(seen, begin)
    at, end = seen * part // parts, seen * (part + 1) // parts
    while at < end:
        first, last = (begin - one, min(one, end)) if at < one else (keys.shape[0] - seen, end)
        slot, size = first + at, min(KEYS, last - at)
        some, theirs = keys[slot:], values[slot : slot + size]
        if some.shape[0] < round_up(size, NARROW_ROWS):  # the last tile wants more
            some = np.zeros((KEYS, dim), np.float32)
            some[:size] = keys[slot : slot + size]
        if dim < columns:
            theirs = np.zeros((size, columns), np.float32)
            theirs[:, :dim] = values[slot : slot + size]
        ahead = min(slot + KEYS, keys.shape[0] - KEYS)
        rows = round_up(size, QUERIES // LANES)
        block = scores[:rows].reshape(rows * LANES // QUERIES, QUERIES)
        for g in range(groups):
            for i in range(0, size, NARROW_ROWS):
                if g == 0:
                    _prefetch_rows(keys, ahead + i)
                    _prefetch_rows(values, ahead + i)
                tile = some[i : i + NARROW_ROWS]
                narrow_tile_product(tile, queries[:, g * LANES :], scores[i:])
            scores[size:rows] = MASK_VALUE
            before[:] = row_maxes[g]
            _update_row_max(row_maxes[g], block)
            _reduce_lanes(row_maxes[g])
            _exp_and_sum(block, before, row_maxes[g], row_sums[g], scale_factor, block_sum)
            of_group = into[g * LANES : (g + 1) * LANES]
            _rescale(of_group, scale_factor)
            for r in range(0, LANES, NARROW_ROWS):
                for c in range(0, columns, LANES):
                    add_narrow_tile_product(scores[:size, r:], theirs[:, c:], of_group[r:, c:])
        at += size
    for n in range(heads):
        row_max[n], row_sum[n] = row_maxes[n // LANES, n % LANES], ZERO
        for r in range(n % LANES, QUERIES, LANES):
            row_sum[n] += row_sums[n // LANES, r]
    acc[:] = into[:heads, :dim]


@kernel
def _prefetch_rows(array, first):
    """Prefetch the rows of a tile."""
    for r in range(max(first, 0), min(first + NARROW_ROWS, array.shape[0])):
        for d in range(0, array.shape[1], 16):
            prefetch(array[r, d:])


@kernel
def _reduce_lanes(row_max):
    """Reduce the maxima of the keys that make a row to one per head: (QUERIES,)."""
    for r in range(LANES, QUERIES):
        row_max[r % LANES] = max(row_max[r % LANES], row_max[r])
    for r in range(LANES, QUERIES):
        row_max[r] = row_max[r % LANES]


@kernel
def combine_splits(q, own, scale, parts, out):
    """Combine a head's splits of `flash_decode_split` with tokens that are in no ring yet.

    q, out: (N,); own: (tokens, 2, N), keys and values; parts: row maxima and row sums, (parts,),
    and accumulators, (parts, N).
    """
    row_maxes, row_sums, acc = parts
    row_max = LOWEST
    scores = np.empty(own.shape[0], np.float32)
    for k in range(scores.size):
        scores[k] = dot(q, own[k, 0]) * (scale * LOG2_E)
        row_max = max(row_max, scores[k])
    for part in range(row_maxes.size):
        row_max = max(row_max, row_maxes[part])
    denominator = ZERO
    out[:] = ZERO
    for k in range(scores.size):
        share, row = exp2(scores[k] - row_max), own[k, 1]
        denominator += share
        for d in range(out.size):
            out[d] += share * row[d]
    for part in range(row_maxes.size):
        share, row = exp2(row_maxes[part] - row_max), acc[part]
        denominator += share * row_sums[part]
        for d in range(out.size):
            out[d] += share * row[d]
    for d in range(out.size):
        out[d] /= denominator
