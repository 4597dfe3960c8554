"""The loops of `loops`, in Python that Numba compiles for the processor at hand.

Each goes through its arrays once, in registers. All have the form
``loop(first, last, *inputs, *outputs)`` and do the units `first` to `last` of their work, of which
threads get a share each: rows, channels or elements. Arrays are contiguous, fp32 unless said
otherwise. A share is cut out first: an index that counts from 0 needs no look at its sign, which
would keep the compiler from working on several numbers at a time.

A file of its own, and a single one: Numba keeps what it compiled beside it, and compiles anew when
this file changes, but not when one that it imports from does. Whoever changes the constants of
`exponential` has to touch this file too.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import int64, njit
from numba.extending import intrinsic

from mlx_rgemma.ops.exponential import (
    BIAS,
    COEFFICIENTS,
    FLAT,
    LEAST,
    MANTISSA_BITS,
    MOST,
    TO_WHOLE,
)
from mlx_rgemma.ops.tiles import (
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


def _compiled(**flags: Any) -> Any:
    """Compile a function: without the interpreter's lock, kept on disk if there is a place."""

    def decorate(function: Any) -> Any:
        options = {"nogil": True, "error_model": "numpy", **flags}
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # no folder that can be written to
            return njit(**options)(function)

    return decorate


loop = _compiled(fastmath={"contract"})
"""Products and sums may be contracted; their order stays, on which `split` relies."""
exact_loop = _compiled()
reduction = _compiled(fastmath={"contract", "reassoc", "nsz"})
"""Sums in any order: several at a time."""

f32, i32 = np.float32, np.int32
ZERO, ONE, TWO = f32(0), f32(1), f32(2)
Q0, Q1, Q2, Q3, Q4, Q5 = (f32(c) for c in COEFFICIENTS)
WHOLE, LOW, HIGH, END = f32(TO_WHOLE), f32(LEAST), f32(MOST), f32(FLAT)
SHIFT, ONE_BITS = i32(MANTISSA_BITS), i32(BIAS << MANTISSA_BITS)
LOG2_E = f32(1.0 / math.log(2.0))
SLOPE, CUBE = f32(2.0 * math.sqrt(2.0 / math.pi)), f32(0.044715)
NORMAL, RESET, PADDING = 0, 1, 2
QUERIES, KEYS = (64, 128) if WIDE else (48, 96)
"""Of a block of scores: whole tiles, which with their queries, keys and values stay in L2."""
HIDDEN, LOWEST = f32(-2e30), f32(-1e30)


# What `exponential` does with whole arrays, for one number.


@loop
def split(x):
    """The nearest whole number of x, as bits of an exponent, and ``2^(the rest) - 1``."""
    whole = x + WHOLE
    f = x - (whole - WHOLE)
    q = ((((Q0 * f + Q1) * f + Q2) * f + Q3) * f + Q4) * f + Q5
    return i32(f32(whole).view(np.int32) << SHIFT), q * f


@loop
def exp2(x):
    n, fraction = split(min(max(x, LOW), HIGH))
    return i32(f32(fraction + ONE).view(np.int32) + n).view(np.float32)


@loop
def sigmoid(x):
    return ONE / (ONE + exp2(x * -LOG2_E))


@loop
def tanh(x):
    n, fraction = split(min(max(x * (TWO * LOG2_E), LOW), END))
    power = i32(n + ONE_BITS).view(np.float32)
    e = (power - ONE) + power * fraction
    return e / (e + TWO)


@loop
def decay(log2_a):
    """-> ``a`` and ``sqrt(1 - a^2)``; log2_a is not above 0."""
    n, fraction = split(max(log2_a, LOW))
    power = i32(n + ONE_BITS).view(np.float32)
    rest = power * fraction
    a = power + rest
    return a, np.sqrt(((ONE - power) - rest) * (ONE + a))


@reduction
def total(row):
    found = ZERO
    for i in range(row.size):
        found += row[i]
    return found


@reduction
def highest(row):
    found = row[0]
    for i in range(row.size):
        found = max(found, row[i])
    return found


@reduction
def dot(one, other):
    found = ZERO
    for i in range(one.size):
        found += one[i] * other[i]
    return found


# RMSNorm, and the addition before it. Units: rows.


@reduction
def mean_square(row):
    found = ZERO
    for i in range(row.size):
        found += row[i] * row[i]
    return found / f32(row.size)


@loop
def normalize(row, scale, eps, out):
    factor = ONE / np.sqrt(mean_square(row) + eps)
    for d in range(row.size):
        out[d] = row[d] * factor * scale[d]


@loop
def rms_norm(first, last, x, scale, eps, y):
    """x, y: (rows, N); scale: (N,), what a normalized row is multiplied by."""
    for n in range(first, last):
        normalize(x[n], scale, eps, y[n])


@loop
def add_rms_norm(first, last, x, delta, scale, eps, sums, y):
    """sums: x + delta; all but scale (rows, N)."""
    for n in range(first, last):
        one, other, row = x[n], delta[n], sums[n]
        for d in range(row.size):
            row[d] = one[d] + other[d]
    rms_norm(first, last, sums, scale, eps, y)


# The causal convolution. Units: tokens of all rows.


@loop
def causal_conv1d(first, last, inputs, weight, bias, segment_pos, y):
    """inputs: (B, K - 1 + L, D); weight: (K, D); segment_pos: (B, L) int32; y: (B, L, D)."""
    taps, length = weight.shape[0], y.shape[1]
    for n in range(first, last):
        b, t = n // length, n % length
        out = y[b, t]
        out[:] = bias
        for back in range(min(taps - 1, segment_pos[b, t]) + 1):
            tap, row = weight[taps - 1 - back], inputs[b, t + taps - 1 - back]
            for d in range(out.size):
                out[d] += tap[d] * row[d]


# GELU of a gate, times what it gates. Units: elements.


@loop
def gelu(x):
    return x * sigmoid(x * (SLOPE + SLOPE * CUBE * (x * x)))


@loop
def gated_gelu(first, last, gate, x, y):
    gate, x, y = gate[first:last], x[first:last], y[first:last]
    for i in range(y.size):
        y[i] = gelu(gate[i]) * x[i]


# The RG-LRU. Units: channels.


@loop
def _kind_factors(kind):
    """1 or 0 each: a step of the recurrence, of padding, of a new document."""
    return f32(kind == NORMAL), f32(kind == PADDING), f32(kind == RESET)


@loop
def rg_lru(first, last, x, gate_i, gate_r, bias_i, bias_r, log2_a_open, h0, kind, h):
    """x, gates, h: (B, L, D); biases, log2_a_open: (D,); h0: (B, D); kind: (B, L) uint8."""
    batch, length, _ = x.shape
    open_, b_i, b_r = log2_a_open[first:last], bias_i[first:last], bias_r[first:last]
    state = np.empty(last - first, np.float32)
    for b in range(batch):
        state[:] = h0[b, first:last]
        for t in range(length):
            normal, padding, reset = _kind_factors(kind[b, t])
            xs, ys = x[b, t, first:last], h[b, t, first:last]
            g_i, g_r = gate_i[b, t, first:last], gate_r[b, t, first:last]
            for d in range(last - first):
                a, multiplier = decay(open_[d] * sigmoid(g_r[d] + b_r[d]))
                a = a * normal + padding
                multiplier = multiplier * normal + reset
                value = a * state[d] + multiplier * sigmoid(g_i[d] + b_i[d]) * xs[d]
                state[d] = value
                ys[d] = value


# Attention within a band of visible keys (FlashAttention, arXiv:2205.14135, algorithm 1): blocks of
# keys, whose scores and powers stay in the caches. They lie a query beside the other, so that
# several queries are worked on at a time, and nothing is summed up within a vector.


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
def _powers(scores, before, top, total, shrink):
    """Scores, in base 2, become powers relative to the highest, and are added up.

    before, top: what was the highest before, and now is; shrink: what earlier sums are to be
    multiplied by. All but scores (QUERIES,).
    """
    for r in range(QUERIES):
        shrink[r] = exp2(before[r] - top[r])
        total[r] *= shrink[r]
    for i in range(scores.shape[0]):
        row = scores[i]
        for r in range(QUERIES):
            power = exp2(row[r] - top[r])
            row[r] = power
            total[r] += power


@loop
def _shrink(sums, factors):
    """Multiply each row by its factor."""
    for r in range(sums.shape[0]):
        row, factor = sums[r], factors[r]
        if factor != ONE:
            for d in range(row.size):
                row[d] *= factor


@loop
def _whole(number, of):
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
    rest = np.zeros((KEYS, dim), np.float32)
    sums = np.empty((QUERIES, dim), np.float32)
    lows, own = np.empty(QUERIES, np.int32), np.empty(QUERIES, np.int32)
    of_queries = np.empty((4, QUERIES), np.float32)
    before, top, total, shrink = of_queries[0], of_queries[1], of_queries[2], of_queries[3]
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
            if keys.shape[0] < _whole(size, ROWS):  # the last tile wants more
                rest[:size] = keys[:size]
                keys = rest
            block = scores[:size]
            for i in range(0, size, ROWS):
                for c in range(0, QUERIES, COLUMNS):
                    tile_product(keys[i : i + ROWS], queries[:, c:], scores[i:, c:])
            if key < last_low or key + size > own[0] + 1:
                _hide(block, key, lows, own)
            before[:] = top
            _raise(top, block)
            _powers(block, before, top, total, shrink)
            _shrink(sums, shrink)
            for r in range(0, QUERIES, ROWS):
                for c in range(0, dim, COLUMNS):
                    add_tile_product(block[:, r:], values[:, c:], sums[r:, c:])
            key += size

        for r in range(rows):
            into, row, share = out[b, start + r, head], sums[r], ONE / total[r]
            for d in range(dim):
                into[d] = row[d] * share


# A token of each of a few rows through a model, part by part. Units: outputs of a matrix, which is
# read once for all rows, unless said otherwise.


@loop
def normalized(x, scale, eps):
    rows = np.empty_like(x)
    rms_norm(0, x.shape[0], x, scale, eps, rows)
    return rows


@loop
def normalized_product(first, last, x, scale, eps, weight, bias, y):
    """A norm of x, (R, D), and a projection of it: weight (out, D), y (R, out)."""
    rows = normalized(x, scale, eps)
    for n in range(first, last):
        for r in range(x.shape[0]):
            y[r, n] = dot(weight[n], rows[r]) + bias[n]


@loop
def added_product(first, last, x, weight, bias, stream):
    """A projection of x, (R, in), added to the stream, (R, out)."""
    for n in range(first, last):
        for r in range(x.shape[0]):
            stream[r, n] += dot(weight[n], x[r]) + bias[n]


@loop
def normalized_mlp(first, last, x, scale, eps, weight, bias, y):
    """A norm, and ``gelu(gate) * up``: weight (2 inner, D), gates first; y (R, inner)."""
    rows = normalized(x, scale, eps)
    inner = weight.shape[0] // 2
    for n in range(first, last):
        for r in range(x.shape[0]):
            gate = dot(weight[n], rows[r]) + bias[n]
            up = dot(weight[inner + n], rows[r]) + bias[inner + n]
            y[r, n] = gelu(gate) * up


@loop
def recurrent_step(
    first, last, yx, taps, tap_bias, weight_i, bias_i, weight_r, bias_r, log2_a_open, conv, h, out
):  # fmt: skip
    """What stands between a recurrent block's projections; conv, (R, K - 1, D), and h change.

    yx: (R, 2 D), the branch that gates and the one that recurs; taps: (K, D); weights of the gates:
    (heads, D / heads, D / heads); h, out: (R, D). Units: rows.
    """
    for r in range(first, last):
        _recur(
            yx[r], taps, tap_bias, weight_i, bias_i, weight_r, bias_r, log2_a_open,
            conv[r], h[r], out[r],
        )  # fmt: skip


@loop
def _recur(
    yx, taps, tap_bias, weight_i, bias_i, weight_r, bias_r, log2_a_open, conv, h, out
):  # fmt: skip
    width, memory = h.size, conv.shape[0]
    x = tap_bias.copy()
    newest = yx[width:]
    for k in range(memory):
        tap, row = taps[k], conv[k]
        for d in range(width):
            x[d] += tap[d] * row[d]
    tap = taps[memory]
    for d in range(width):
        x[d] += tap[d] * newest[d]
    for k in range(memory - 1):
        conv[k] = conv[k + 1]
    if memory:
        conv[memory - 1] = newest

    gate_i, gate_r = bias_i.copy(), bias_r.copy()
    heads, size = weight_i.shape[0], weight_i.shape[1]
    for head in range(heads):
        of_i, of_r = gate_i[head * size :][:size], gate_r[head * size :][:size]
        for k in range(size):
            value, row_i, row_r = x[head * size + k], weight_i[head, k], weight_r[head, k]
            for d in range(size):
                of_i[d] += value * row_i[d]
                of_r[d] += value * row_r[d]
    for d in range(width):
        a, multiplier = decay(log2_a_open[d] * sigmoid(gate_r[d]))
        value = a * h[d] + multiplier * sigmoid(gate_i[d]) * x[d]
        h[d] = value
        out[d] = value * gelu(yx[d])


@loop
def rotate(first, last, heads, turned, cos, sin):
    """heads: (R, H, head_dim), of which so many change; cos, sin: (R, P). Units: rows."""
    pairs = cos.shape[1]
    for r in range(first, last):
        for n in range(turned):
            for j in range(pairs):
                one, other = heads[r, n, j], heads[r, n, pairs + j]
                heads[r, n, j] = one * cos[r, j] - other * sin[r, j]
                heads[r, n, pairs + j] = other * cos[r, j] + one * sin[r, j]


@loop
def ring_step(first, last, q, ring, newest, seen, scale, tops, totals, sums):
    """Attention of one query over a ring, in parts that `join_parts` puts together. Units: parts.

    q: (H, N); ring: (2, slots, N); the newest token lies in slot `newest`, and so many are seen,
    backwards from it: two runs of slots, the second before the ring's end. tops, totals: (parts,
    H), a part's highest score, in base 2, and the sum of its powers; sums: (parts, H, N).

    `LANES` heads at a time, whose scores lie beside each other; several keys make a row of
    `QUERIES`.
    """
    parts, heads, dim = sums.shape
    width, columns = _whole(heads, LANES), _whole(dim, LANES)
    queries = np.zeros((dim, width), np.float32)
    for n in range(heads):
        for d in range(dim):
            queries[d, n] = q[n, d] * (scale * LOG2_E)
    scores = np.empty((KEYS, LANES), np.float32)
    rest = np.zeros((2, KEYS, columns), np.float32)
    top = np.empty((width // LANES, QUERIES), np.float32)
    total = np.empty_like(top)
    before, shrink = np.empty(QUERIES, np.float32), np.empty(QUERIES, np.float32)
    into = np.empty((width, columns), np.float32)
    one = min(seen, newest + 1)
    begin, again = newest + 1 - one, ring.shape[1] - seen
    for part in range(first, last):
        top[:], total[:], into[:] = LOWEST, ZERO, ZERO
        at, end = seen * part // parts, seen * (part + 1) // parts
        while at < end:
            slot, stop = (begin + at, min(one, end)) if at < one else (again + at, end)
            size = min(KEYS, stop - at)
            keys, values = ring[0, slot:], ring[1, slot : slot + size]
            if keys.shape[0] < _whole(size, NARROW_ROWS):  # the last tile wants more
                rest[0, :size, :dim] = keys[:size]
                keys = rest[0, :, :dim]
            if dim < columns:
                rest[1, :size, :dim] = values
                values = rest[1, :size]
            rows = _whole(size, QUERIES // LANES)
            block = scores[:rows].reshape(rows * LANES // QUERIES, QUERIES)
            for g in range(width // LANES):
                h = g * LANES
                for i in range(0, size, NARROW_ROWS):
                    if g == 0:
                        for r in range(NARROW_ROWS):
                            for d in range(0, dim, 16):
                                fetch(ring[0, slot + KEYS + i + r, d:])
                                fetch(ring[1, slot + KEYS + i + r, d:])
                    narrow_tile_product(keys[i : i + NARROW_ROWS], queries[:, h:], scores[i:])
                scores[size:rows] = HIDDEN
                before[:] = top[g]
                _raise(top[g], block)
                _agree(top[g])
                _powers(block, before, top[g], total[g], shrink)
                _shrink(into[h : h + LANES], shrink)
                for r in range(0, LANES, NARROW_ROWS):
                    for c in range(0, columns, LANES):
                        powers, place = scores[:size, r:], into[h + r :, c:]
                        add_narrow_tile_product(powers, values[:, c:], place)
            at += size
        for n in range(heads):
            g, h = n // LANES, n % LANES
            tops[part, n], totals[part, n] = top[g, h], ZERO
            for r in range(h, QUERIES, LANES):
                totals[part, n] += total[g, r]
        sums[part] = into[:heads, :dim]


@loop
def _agree(top):
    """The highest score of each head, of the keys that make a row: (QUERIES,)."""
    for r in range(LANES, QUERIES):
        top[r % LANES] = max(top[r % LANES], top[r])
    for r in range(LANES, QUERIES):
        top[r] = top[r % LANES]


@loop
def join_parts(first, last, tops, totals, sums, out):
    """What parts of `ring_step` are together: out (H, head_dim). Units: heads."""
    parts = tops.shape[0]
    for n in range(first, last):
        top, whole, row = tops[0, n], ZERO, out[n]
        for part in range(parts):
            top = max(top, tops[part, n])
        row[:] = ZERO
        for part in range(parts):
            weight, values = exp2(tops[part, n] - top), sums[part, n]
            whole += weight * totals[part, n]
            for d in range(row.size):
                row[d] += weight * values[d]
        for d in range(row.size):
            row[d] /= whole


@loop
def capped_scores(first, last, x, scale, eps, weight, cap, y):
    """The final norm, and the scores of all words, capped unless cap is 0: weight (words, D)."""
    rows = normalized(x, scale, eps)
    for n in range(first, last):
        for r in range(x.shape[0]):
            score = dot(weight[n], rows[r])
            y[r, n] = tanh(score / cap) * cap if cap > ZERO else score


# Adam's update (arXiv:1412.6980, algorithm 1), every operation rounded as MLX's. Units: elements.


@exact_loop
def adam(first, last, numbers, parameter, m, v, gradient):
    """m and v change, and the new parameter takes the gradient's place.

    numbers: (8,), fp32: b1, 1 - b1, b2, 1 - b2, what the first moment is multiplied by, what the
    second's root is, epsilon, what the parameter is multiplied by.
    """
    b1, rest1, b2, rest2 = numbers[0], numbers[1], numbers[2], numbers[3]
    rate, root, eps, shrink = numbers[4], numbers[5], numbers[6], numbers[7]
    parameter, m, v = parameter[first:last], m[first:last], v[first:last]
    gradient = gradient[first:last]
    for i in range(gradient.size):
        g = gradient[i]
        m_i = b1 * m[i] + rest1 * g
        v_i = b2 * v[i] + rest2 * (g * g)
        m[i] = m_i
        v[i] = v_i
        gradient[i] = parameter[i] * shrink - rate * m_i / (np.sqrt(v_i) * root + eps)


# For `team`: a thread that looks at what another one writes.


@intrinsic
def _seen(typing, counter):
    """The first number of an array, from memory each time."""

    def generate(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.load_atomic(data, "acquire", 8)

    return int64(counter), generate


@loop
def look_out(counter, before, looks, looks_more):
    """Until the counter, (1,) int64, is not what it was before; so many looks at most."""
    for _ in range(looks):
        if _seen(counter) != before:
            break
    for _ in range(looks_more):
        _seen(counter)
