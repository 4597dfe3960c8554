"""A few tokens of one or more sequences through a layer, on all threads.

All threads run the kernel and synchronize at barriers between dependent stages: to start a kernel
for each stage would take longer than many a stage. A matrix is read once for all tokens; a thread
computes some of its outputs, and some of the heads between two matrices.

Layers have the form ``layer(thread, _, num_threads, barrier, x, ...)``: the thread's index, the
barrier's counter, (1,) int64, that begins at 0, and the residual stream, (T, D), which changes: T
tokens, as many of each of the B sequences, one sequence after the other.
"""

from __future__ import annotations

import numpy as np

from mlx_rgemma.cpu.kernels.attention import combine_splits, flash_decode_split
from mlx_rgemma.cpu.kernels.compiler import kernel
from mlx_rgemma.cpu.kernels.functions import (
    ZERO,
    dot,
    gate_coefficients,
    gelu,
    normalize,
    sigmoid,
    tanh,
)
from mlx_rgemma.cpu.kernels.threads import barrier_wait


@kernel
def recurrent_layer(
    thread,
    _,
    num_threads,
    barrier,
    x,
    in_proj,
    recurrence,
    out_proj,
    mlp,
    conv,
    h,
    yx,
    out,
    mlp_hidden,
):
    """A recurrent block and an MLP.

    in_proj: scale and epsilon of a norm, weight and bias of both projections; recurrence: taps (K,
    lru), their bias, weights (heads, lru / heads, lru / heads) and biases of the input gate and the
    recurrence gate, log2 of a where the gate is open; out_proj: weight and bias; mlp: see `_mlp`;
    conv, (B, K - 1, lru), and h, (B, lru), change. Outputs: yx, (T, 2 lru), the branch that
    gates and the one that recurs; out, (T, lru); mlp_hidden, (T, channels).
    """
    _normalized_product(thread, num_threads, x, in_proj, yx)
    barrier_wait(barrier, num_threads)
    length = x.shape[0] // h.shape[0]
    for t in range(x.shape[0]):
        b = t // length
        _recurrence_step(thread, num_threads, yx[t], recurrence, conv[b], h[b], out[t])
    barrier_wait(barrier, 2 * num_threads)
    _add_product(thread, num_threads, out, out_proj, x)
    barrier_wait(barrier, 3 * num_threads)
    _mlp(thread, num_threads, barrier, 4 * num_threads, x, mlp, mlp_hidden)


@kernel
def attention_layer(
    thread, _, num_threads, barrier, x, in_proj, out_proj, mlp, cos, sin, rings, begin, seen, scale,
    qkv, row_maxes, row_sums, acc, out, mlp_hidden,
):  # fmt: skip
    """Local attention and an MLP.

    in_proj, out_proj, mlp: as for a recurrent layer; cos, sin: (T, P); rings: (B, 2, slots, N), of
    which each token sees `seen`, (T,) int64, the last of them before slot `begin`, and its
    sequence's tokens before it here. Outputs: qkv, (T, H + 2, N), the heads of queries, key and
    value, rotated; row_maxes, row_sums, (T, num_threads, H), and acc, (T, num_threads, H, N), of
    splits; out, (T, H, N); mlp_hidden.
    """
    tokens, heads = x.shape[0], qkv.shape[1] - 2
    length = tokens // rings.shape[0]
    _normalized_product(thread, num_threads, x, in_proj, qkv.reshape(tokens, -1))
    barrier_wait(barrier, num_threads)
    first, last = _part(thread, num_threads, tokens * (heads + 1))
    for n in range(first, last):
        t = n // (heads + 1)
        _rotate(qkv[t, n % (heads + 1)], cos[t], sin[t])
    barrier_wait(barrier, 2 * num_threads)
    for t in range(tokens):
        ring = rings[t // length]
        flash_decode_split(
            thread, num_threads, qkv[t, :heads], ring[0], ring[1], begin, seen[t], scale,
            row_maxes[t, thread], row_sums[t, thread], acc[t, thread],
        )  # fmt: skip
    barrier_wait(barrier, 3 * num_threads)
    first, last = _part(thread, num_threads, tokens * heads)
    for n in range(first, last):
        t, head = n // heads, n % heads
        own = qkv[t // length * length : t + 1, heads:]
        parts = row_maxes[t, :, head], row_sums[t, :, head], acc[t, :, head]
        combine_splits(qkv[t, head], own, scale, parts, out[t, head])
    barrier_wait(barrier, 4 * num_threads)
    _add_product(thread, num_threads, out.reshape(tokens, -1), out_proj, x)
    barrier_wait(barrier, 5 * num_threads)
    _mlp(thread, num_threads, barrier, 6 * num_threads, x, mlp, mlp_hidden)


@kernel
def lm_head(first, last, x, norm, weight, cap, y):
    """Final norm and logits, soft-capped unless cap is 0. Work items: tokens of the vocabulary.

    norm: scale and epsilon; weight: (vocab_size, D); y: (T, vocab_size).
    """
    rows = _normalized(x, norm[0], norm[1])
    for n in range(first, last):
        for r in range(x.shape[0]):
            score = dot(weight[n], rows[r])
            y[r, n] = tanh(score / cap) * cap if cap > ZERO else score


@kernel
def _part(thread, num_threads, number):
    """Return the beginning and the end of a thread's part of a number of items."""
    return number * thread // num_threads, number * (thread + 1) // num_threads


@kernel
def _normalized(x, scale, eps):
    rows = np.empty_like(x)
    for r in range(x.shape[0]):
        normalize(x[r], scale, eps, rows[r])
    return rows


@kernel
def _normalized_product(thread, num_threads, x, in_proj, y):
    """A norm of x, and a projection of it: y (T, out)."""
    scale, eps, weight, bias = in_proj
    rows = _normalized(x, scale, eps)
    first, last = _part(thread, num_threads, bias.size)
    for n in range(first, last):
        for r in range(x.shape[0]):
            y[r, n] = dot(weight[n], rows[r]) + bias[n]


@kernel
def _add_product(thread, num_threads, x, linear, stream):
    """A projection of x, (T, in), added to the stream, (T, out)."""
    weight, bias = linear
    first, last = _part(thread, num_threads, bias.size)
    for n in range(first, last):
        for r in range(x.shape[0]):
            stream[r, n] += dot(weight[n], x[r]) + bias[n]


@kernel
def _mlp(thread, num_threads, barrier, arrived, x, mlp, mlp_hidden):
    """A norm, ``gelu(gate) * up``, and a projection of that added to the stream.

    mlp: scale and epsilon of the norm, weight and bias of gates and ups, weight and bias of the
    projection; arrived: the barrier's count when all have written `mlp_hidden`.
    """
    scale, eps, weight, bias, down, down_bias = mlp
    rows = _normalized(x, scale, eps)
    channels = mlp_hidden.shape[1]
    first, last = _part(thread, num_threads, channels)
    for n in range(first, last):
        for r in range(x.shape[0]):
            gate = dot(weight[n], rows[r]) + bias[n]
            up = dot(weight[channels + n], rows[r]) + bias[channels + n]
            mlp_hidden[r, n] = gelu(gate) * up
    barrier_wait(barrier, arrived)
    _add_product(thread, num_threads, mlp_hidden, (down, down_bias), x)


@kernel
def _recurrence_step(thread, num_threads, yx, recurrence, conv, h, out):
    """Convolution, gates and RG-LRU of one token. Work items: heads of the gates."""
    taps, tap_bias, weight_i, bias_i, weight_r, bias_r, log2_a_open = recurrence
    width, memory = h.size, conv.shape[0]
    heads, size = weight_i.shape[0], weight_i.shape[1]
    first, last = _part(thread, num_threads, heads)
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
            a, multiplier = gate_coefficients(open_[d] * sigmoid(gate_r[d]))
            value = a * state[d] + multiplier * sigmoid(gate_i[d]) * x[d]
            state[d] = value
            given[d] = value * gelu(gating[d])


@kernel
def _rotate(head, cos, sin):
    """head: (N,), of which 2 P change; cos, sin: (P,)."""
    pairs = cos.size
    for j in range(pairs):
        one, other = head[j], head[pairs + j]
        head[j] = one * cos[j] - other * sin[j]
        head[pairs + j] = other * cos[j] + one * sin[j]
