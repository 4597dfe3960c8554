"""A few tokens of one or more sequences through a layer, by all cores together.

Each core does its part of the outputs of a matrix, which is read once for all of them, and of the
heads between two matrices. Where one needs what others make, they meet: to begin a loop of its own
for each part would take longer than many a part does.

Layers have the form ``layer(core, _, cores, arrivals, x, ...)``: one core of so many, a counter,
(1,) int64, that begins at 0, and the residual stream, (T, D), which changes: T tokens, as many of
each of the B sequences, one sequence behind the other.
"""

from __future__ import annotations

import numpy as np

from mlx_rgemma.ops.compiled.attention import attend_to_ring, join_parts
from mlx_rgemma.ops.compiled.compiler import loop
from mlx_rgemma.ops.compiled.functions import ZERO, decay, dot, gelu, normalize, sigmoid, tanh
from mlx_rgemma.ops.compiled.threads import meet


@loop
def recurrent_layer(
    core, _, cores, arrivals, x, entry, recurrence, exit_, mlp, conv, h, yx, out, inner
):
    """A recurrent block and an MLP.

    entry: scale and epsilon of a norm, weight and bias of both projections; recurrence: taps (K,
    lru), their bias, weights (heads, lru / heads, lru / heads) and biases of the input gate and the
    recurrence gate, log2 of a where the gate is open; exit_: weight and bias; mlp: see `_mlp`;
    conv, (B, K - 1, lru), and h, (B, lru), change. To be made: yx, (T, 2 lru), the branch that
    gates and the one that recurs; out, (T, lru); inner, (T, channels).
    """
    _normalized_product(core, cores, x, entry, yx)
    meet(arrivals, cores)
    length = x.shape[0] // h.shape[0]
    for t in range(x.shape[0]):
        b = t // length
        _recur(core, cores, yx[t], recurrence, conv[b], h[b], out[t])
    meet(arrivals, 2 * cores)
    _add_product(core, cores, out, exit_, x)
    meet(arrivals, 3 * cores)
    _mlp(core, cores, arrivals, 4 * cores, x, mlp, inner)


@loop
def attention_layer(
    core, _, cores, arrivals, x, entry, exit_, mlp, cos, sin, rings, begin, seen, scale,
    qkv, tops, totals, sums, out, inner,
):  # fmt: skip
    """Local attention and an MLP.

    entry, exit_, mlp: as for a recurrent layer; cos, sin: (T, P); rings: (B, 2, slots, N), of which
    each token sees so many, (T,) int64, the last of them before slot `begin`, and its sequence's
    tokens before it here. To be made: qkv, (T, H + 2, N), the heads of queries, key and value,
    rotated; tops, totals, (T, cores, H), and sums, (T, cores, H, N), of parts; out, (T, H, N);
    inner.
    """
    tokens, heads = x.shape[0], qkv.shape[1] - 2
    length = tokens // rings.shape[0]
    _normalized_product(core, cores, x, entry, qkv.reshape(tokens, -1))
    meet(arrivals, cores)
    first, last = _part(core, cores, tokens * (heads + 1))
    for n in range(first, last):
        t = n // (heads + 1)
        _rotate(qkv[t, n % (heads + 1)], cos[t], sin[t])
    meet(arrivals, 2 * cores)
    for t in range(tokens):
        ring = rings[t // length]
        attend_to_ring(
            core, cores, qkv[t, :heads], ring[0], ring[1], begin, seen[t], scale,
            tops[t, core], totals[t, core], sums[t, core],
        )  # fmt: skip
    meet(arrivals, 3 * cores)
    first, last = _part(core, cores, tokens * heads)
    for n in range(first, last):
        t, head = n // heads, n % heads
        own = qkv[t // length * length : t + 1, heads:]
        parts = tops[t, :, head], totals[t, :, head], sums[t, :, head]
        join_parts(qkv[t, head], own, scale, parts, out[t, head])
    meet(arrivals, 4 * cores)
    _add_product(core, cores, out.reshape(tokens, -1), exit_, x)
    meet(arrivals, 5 * cores)
    _mlp(core, cores, arrivals, 6 * cores, x, mlp, inner)


@loop
def capped_scores(first, last, x, norm, weight, cap, y):
    """The final norm, and the scores of all words, capped unless cap is 0. Units: words.

    norm: scale and epsilon; weight: (words, D); y: (T, words).
    """
    rows = _normalized(x, norm[0], norm[1])
    for n in range(first, last):
        for r in range(x.shape[0]):
            score = dot(weight[n], rows[r])
            y[r, n] = tanh(score / cap) * cap if cap > ZERO else score


@loop
def _part(core, cores, number):
    """Where a core's part of so many begins and ends."""
    return number * core // cores, number * (core + 1) // cores


@loop
def _normalized(x, scale, eps):
    rows = np.empty_like(x)
    for r in range(x.shape[0]):
        normalize(x[r], scale, eps, rows[r])
    return rows


@loop
def _normalized_product(core, cores, x, entry, y):
    """A norm of x, and a projection of it: y (T, out)."""
    scale, eps, weight, bias = entry
    rows = _normalized(x, scale, eps)
    first, last = _part(core, cores, bias.size)
    for n in range(first, last):
        for r in range(x.shape[0]):
            y[r, n] = dot(weight[n], rows[r]) + bias[n]


@loop
def _add_product(core, cores, x, linear, stream):
    """A projection of x, (T, in), added to the stream, (T, out)."""
    weight, bias = linear
    first, last = _part(core, cores, bias.size)
    for n in range(first, last):
        for r in range(x.shape[0]):
            stream[r, n] += dot(weight[n], x[r]) + bias[n]


@loop
def _mlp(core, cores, arrivals, arrived, x, mlp, inner):
    """A norm, ``gelu(gate) * up``, and a projection of that added to the stream.

    mlp: scale and epsilon of the norm, weight and bias of gates and ups, weight and bias of the
    projection; arrived: arrivals when all have made what they make of `inner`.
    """
    scale, eps, weight, bias, down, down_bias = mlp
    rows = _normalized(x, scale, eps)
    channels = inner.shape[1]
    first, last = _part(core, cores, channels)
    for n in range(first, last):
        for r in range(x.shape[0]):
            gate = dot(weight[n], rows[r]) + bias[n]
            up = dot(weight[channels + n], rows[r]) + bias[channels + n]
            inner[r, n] = gelu(gate) * up
    meet(arrivals, arrived)
    _add_product(core, cores, inner, (down, down_bias), x)


@loop
def _recur(core, cores, yx, recurrence, conv, h, out):
    """What stands between a recurrent block's projections, of a token: heads of the gates."""
    taps, tap_bias, weight_i, bias_i, weight_r, bias_r, log2_a_open = recurrence
    width, memory = h.size, conv.shape[0]
    heads, size = weight_i.shape[0], weight_i.shape[1]
    first, last = _part(core, cores, heads)
    for head in range(first, last):
        low, high = head * size, (head + 1) * size
        x = tap_bias[low:high].copy()
        gate_i, gate_r = bias_i[low:high].copy(), bias_r[low:high].copy()
        newest = yx[width + low : width + high]
        for k in range(memory):
            tap, row = taps[k, low:high], conv[k, low:high]
            for d in range(size):
                x[d] += tap[d] * row[d]
        tap = taps[memory, low:high]
        for d in range(size):
            x[d] += tap[d] * newest[d]
        for k in range(memory - 1):
            conv[k, low:high] = conv[k + 1, low:high]
        if memory:
            conv[memory - 1, low:high] = newest

        for k in range(size):
            value, row_i, row_r = x[k], weight_i[head, k], weight_r[head, k]
            for d in range(size):
                gate_i[d] += value * row_i[d]
                gate_r[d] += value * row_r[d]
        open_, gating = log2_a_open[low:high], yx[low:high]
        state, given = h[low:high], out[low:high]
        for d in range(size):
            a, multiplier = decay(open_[d] * sigmoid(gate_r[d]))
            value = a * state[d] + multiplier * sigmoid(gate_i[d]) * x[d]
            state[d] = value
            given[d] = value * gelu(gating[d])


@loop
def _rotate(head, cos, sin):
    """head: (N,), of which 2 P change; cos, sin: (P,)."""
    pairs = cos.size
    for j in range(pairs):
        one, other = head[j], head[pairs + j]
        head[j] = one * cos[j] - other * sin[j]
        head[pairs + j] = other * cos[j] + one * sin[j]
