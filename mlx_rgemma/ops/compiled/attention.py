"""Attention (FlashAttention, arXiv:2205.14135, algorithm 1), of a chunk and of a step.

Keys are gone through in blocks, whose scores and powers stay in the caches. Scores of a key lie
beside each other, so that several queries are worked on at a time, and nothing is summed up within
a vector.
"""

from __future__ import annotations

import numpy as np

from mlx_rgemma.ops.compiled.compiler import loop
from mlx_rgemma.ops.compiled.functions import LOG2_E, ONE, ZERO, dot, exp2, f32, i32
from mlx_rgemma.ops.compiled.tiles import (
    COLUMNS,
    LANES,
    NARROW_ROWS,
    ROWS,
    WIDE,
    add_narrow_tile_product,
    add_tile_product,
    fetch,
    narrow_tile_product,
    tile_product,
)

QUERIES, KEYS = (64, 128) if WIDE else (48, 96)
"""Of a block of scores: whole tiles, which with their queries, keys and values stay in L2."""
HIDDEN, LOWEST = f32(-2e30), f32(-1e30)


@loop
def _hide(scores, key, low, own):
    """Scores of a block of keys, the first of which is number `key`: those out of sight."""
    for i in range(scores.shape[0]):
        row, at = scores[i], i32(key + i)
        for r in range(QUERIES):
            seen = (at >= low[r]) & (at <= own[r])
            row[r] = row[r] if seen else HIDDEN


@loop
def _raise(top, scores):
    """top: (QUERIES,), the highest scores of what has been seen; scores: (n, QUERIES)."""
    for i in range(scores.shape[0]):
        row = scores[i]
        for r in range(QUERIES):
            top[r] = max(top[r], row[r])


@loop
def _powers(scores, before, top, total, shrink, part):
    """Scores, in base 2, become powers relative to the highest, and are added up.

    before, top: what was the highest before, and now is; shrink: what earlier sums are to be
    multiplied by; part: room for the sum of this block, which is added to that of the others as
    one, so that rounding does not grow with the keys. All but scores (QUERIES,).
    """
    part[:] = ZERO
    for i in range(scores.shape[0]):
        row = scores[i]
        for r in range(QUERIES):
            power = exp2(row[r] - top[r])
            row[r] = power
            part[r] += power
    for r in range(QUERIES):
        shrink[r] = exp2(before[r] - top[r])
        total[r] = total[r] * shrink[r] + part[r]


@loop
def _shrink(sums, factors):
    """Multiply each row by its factor."""
    for r in range(sums.shape[0]):
        row, factor = sums[r], factors[r]
        if factor != ONE:
            for d in range(row.size):
                row[d] *= factor


@loop
def whole(number, of):
    """The next multiple."""
    return (number + of - 1) // of * of


@loop
def band_attention(first, last, q, kv, low, scale, out):
    """Softmax attention of queries that are the last of the keys' tokens.

    q: (B, H, L, N), N a multiple of COLUMNS; kv: (B, 2, K, N); low: (B, L) int32, the oldest key
    that a query sees; scale: of scores in base 2; out: (B, L, H, N). Units: blocks of queries of a
    head, early ones, which see less, by turns with late ones.
    """
    heads, length, dim = q.shape[1:]
    blocks, past = (length + QUERIES - 1) // QUERIES, kv.shape[2] - length
    queries = np.empty((dim, QUERIES), np.float32)
    scores = np.empty((KEYS, QUERIES), np.float32)
    sums = np.empty((QUERIES, dim), np.float32)
    lows, own = np.empty(QUERIES, np.int32), np.empty(QUERIES, np.int32)
    of_queries = np.empty((5, QUERIES), np.float32)
    before, top, total, shrink = of_queries[0], of_queries[1], of_queries[2], of_queries[3]
    part_total = of_queries[4]
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
        top[:] = LOWEST
        total[:] = ZERO
        sums[:] = ZERO

        end = own[rows - 1] + 1
        key, last_low = lows.min(), lows.max()
        while key < end:
            size = min(KEYS, end - key)
            keys, values = kv[b, 0, key:], kv[b, 1, key : key + size]
            if keys.shape[0] < whole(size, ROWS):  # the last tile wants more
                keys = np.zeros((KEYS, dim), np.float32)
                keys[:size] = kv[b, 0, key : key + size]
            block = scores[:size]
            for i in range(0, size, ROWS):
                for c in range(0, QUERIES, COLUMNS):
                    tile_product(keys[i : i + ROWS], queries[:, c:], scores[i:, c:])
            if key < last_low or key + size > own[0] + 1:
                _hide(block, key, lows, own)
            before[:] = top
            _raise(top, block)
            _powers(block, before, top, total, shrink, part_total)
            _shrink(sums, shrink)
            for r in range(0, QUERIES, ROWS):
                for c in range(0, dim, COLUMNS):
                    add_tile_product(block[:, r:], values[:, c:], sums[r:, c:])
            key += size

        for r in range(rows):
            into, row, share = out[b, start + r, head], sums[r], ONE / total[r]
            for d in range(dim):
                into[d] = row[d] * share


@loop
def attend_to_ring(part, parts, q, keys, values, begin, seen, scale, top, total, sums):
    """A part of the attention of one token over the tokens before it, which lie in a ring.

    q: (H, N); keys, values: (slots, N), of which so many are `seen`, the last of them before slot
    `begin`; top, total: (H,), the highest score, in base 2, and the sum of the powers; sums: (H,
    N).

    `LANES` heads at a time, whose scores lie beside each other; several keys make a row of
    `QUERIES`.
    """
    heads, dim = sums.shape
    groups, columns = whole(heads, LANES) // LANES, whole(dim, LANES)
    queries = np.zeros((dim, groups * LANES), np.float32)
    for n in range(heads):
        for d in range(dim):
            queries[d, n] = q[n, d] * (scale * LOG2_E)
    scores = np.empty((KEYS, LANES), np.float32)
    into = np.zeros((groups * LANES, columns), np.float32)
    tops, totals = np.empty((groups, QUERIES), np.float32), np.zeros((groups, QUERIES), np.float32)
    before, shrink = np.empty(QUERIES, np.float32), np.empty(QUERIES, np.float32)
    part_total = np.empty(QUERIES, np.float32)
    tops[:] = LOWEST
    one = min(seen, begin)
    at, end = seen * part // parts, seen * (part + 1) // parts
    while at < end:
        first, last = (begin - one, min(one, end)) if at < one else (keys.shape[0] - seen, end)
        slot, size = first + at, min(KEYS, last - at)
        some, theirs = keys[slot:], values[slot : slot + size]
        if some.shape[0] < whole(size, NARROW_ROWS):  # the last tile wants more
            some = np.zeros((KEYS, dim), np.float32)
            some[:size] = keys[slot : slot + size]
        if dim < columns:
            theirs = np.zeros((size, columns), np.float32)
            theirs[:, :dim] = values[slot : slot + size]
        ahead = min(slot + KEYS, keys.shape[0] - KEYS)
        rows = whole(size, QUERIES // LANES)
        block = scores[:rows].reshape(rows * LANES // QUERIES, QUERIES)
        for g in range(groups):
            for i in range(0, size, NARROW_ROWS):
                if g == 0:
                    _fetch_rows(keys, ahead + i)
                    _fetch_rows(values, ahead + i)
                tile = some[i : i + NARROW_ROWS]
                narrow_tile_product(tile, queries[:, g * LANES :], scores[i:])
            scores[size:rows] = HIDDEN
            before[:] = tops[g]
            _raise(tops[g], block)
            _agree(tops[g])
            _powers(block, before, tops[g], totals[g], shrink, part_total)
            of_group = into[g * LANES : (g + 1) * LANES]
            _shrink(of_group, shrink)
            for r in range(0, LANES, NARROW_ROWS):
                for c in range(0, columns, LANES):
                    add_narrow_tile_product(scores[:size, r:], theirs[:, c:], of_group[r:, c:])
        at += size
    for n in range(heads):
        top[n], total[n] = tops[n // LANES, n % LANES], ZERO
        for r in range(n % LANES, QUERIES, LANES):
            total[n] += totals[n // LANES, r]
    sums[:] = into[:heads, :dim]


@loop
def _fetch_rows(array, first):
    """Have the memory bring what a tile is to be made of."""
    for r in range(max(first, 0), min(first + NARROW_ROWS, array.shape[0])):
        for d in range(0, array.shape[1], 16):
            fetch(array[r, d:])


@loop
def _agree(top):
    """The highest score of each head, of the keys that make a row: (QUERIES,)."""
    for r in range(LANES, QUERIES):
        top[r % LANES] = max(top[r % LANES], top[r])
    for r in range(LANES, QUERIES):
        top[r] = top[r % LANES]


@loop
def join_parts(q, own, scale, parts, out):
    """What a head's parts of `attend_to_ring`, and tokens that are in no ring yet, are together.

    q, out: (N,); own: (tokens, 2, N), keys and values; parts: highest scores and totals, (parts,),
    and sums, (parts, N).
    """
    tops, totals, sums = parts
    top = LOWEST
    scores = np.empty(own.shape[0], np.float32)
    for k in range(scores.size):
        scores[k] = dot(q, own[k, 0]) * (scale * LOG2_E)
        top = max(top, scores[k])
    for part in range(tops.size):
        top = max(top, tops[part])
    whole_sum = ZERO
    out[:] = ZERO
    for k in range(scores.size):
        share, row = exp2(scores[k] - top), own[k, 1]
        whole_sum += share
        for d in range(out.size):
            out[d] += share * row[d]
    for part in range(tops.size):
        share, row = exp2(tops[part] - top), sums[part]
        whole_sum += share * totals[part]
        for d in range(out.size):
            out[d] += share * row[d]
    for d in range(out.size):
        out[d] /= whole_sum
