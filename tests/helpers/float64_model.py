"""A whole model in float64 NumPy, from the equations: what float32 is measured against.

Written apart from the code under test, of which it takes the weights and the configuration alone.
One sequence; everything that is exact in float64 (angles included) is left so.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from mlx.utils import tree_flatten

from mlx_rgemma import GriffinConfig, Model

Array = np.ndarray[Any, Any]

QUERIES = 256
"""Queries that attend at once."""


def float64_logits(model: Model, tokens: Array) -> Array:
    """Return the logits of a sequence: (L,) token ids to (L, vocab_size)."""
    c = model.args
    weights: Any = tree_flatten(model.parameters())
    w = {name.removeprefix("model."): np.array(value, np.float64) for name, value in weights}
    x = w["embed_tokens.weight"][tokens]
    if c.embeddings_scale_by_sqrt_dim:
        x = x * _bfloat16(math.sqrt(c.hidden_size))
    for i, kind in enumerate(c.layer_types):
        part = f"layers.{i}."
        layer = {k.removeprefix(part): v for k, v in w.items() if k.startswith(part)}
        block = {k.removeprefix("temporal_block."): v for k, v in layer.items()}
        normed = _norm(x, layer["temporal_pre_norm.weight"], c.rms_norm_eps)
        x = x + (_recurrent if kind == "recurrent" else _attention)(normed, block, c)
        x = x + _mlp(_norm(x, layer["channel_pre_norm.weight"], c.rms_norm_eps), layer)
    logits = _norm(x, w["final_norm.weight"], c.rms_norm_eps) @ w["embed_tokens.weight"].T
    cap = c.logits_soft_cap
    return cap * np.tanh(logits / cap) if cap else logits


def _bfloat16(value: float) -> float:
    bits = np.float32(value).view(np.uint32)
    rounded = (int(bits) + 0x7FFF + (int(bits) >> 16 & 1)) >> 16 << 16
    return float(np.uint32(rounded).view(np.float32))


def _norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + eps) * (1.0 + weight)


def _linear(x: Array, w: dict[str, Array], name: str) -> Array:
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def _gelu(x: Array) -> Array:
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def _sigmoid(x: Array) -> Array:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def _mlp(x: Array, w: dict[str, Array]) -> Array:
    gate, up = (_linear(x, w, f"mlp_block.{name}") for name in ("gate_proj", "up_proj"))
    return _linear(_gelu(gate) * up, w, "mlp_block.down_proj")


def _recurrent(x: Array, w: dict[str, Array], c: GriffinConfig) -> Array:
    y, x = _gelu(_linear(x, w, "linear_y")), _linear(x, w, "linear_x")
    taps = w["conv_1d.weight"][..., 0]  # (D, K), the last for the token itself
    padded = np.concatenate([np.zeros((taps.shape[1] - 1, x.shape[1])), x])
    x = w["conv_1d.bias"] + sum(padded[k : k + len(x)] * taps[:, k] for k in range(taps.shape[1]))
    heads = x.reshape(len(x), c.num_attention_heads, -1)

    def gate(name: str) -> Array:
        product = np.einsum("lhi,hij->lhj", heads, w[f"rg_lru.{name}_weight"])
        return _sigmoid(product + w[f"rg_lru.{name}_bias"]).reshape(x.shape)

    log_a = -8.0 * gate("recurrent_gate") * np.logaddexp(w["rg_lru.recurrent_param"], 0.0)
    a, multiplier = np.exp(log_a), np.sqrt(-np.expm1(2.0 * log_a))
    multiplier[0] = 1.0
    h, state = multiplier * gate("input_gate") * x, np.zeros(x.shape[1])
    for t in range(len(h)):
        state = (a[t] * state if t else 0.0) + h[t]
        h[t] = state
    return _linear(h * y, w, "linear_out")


def _attention(x: Array, w: dict[str, Array], c: GriffinConfig) -> Array:
    length, dim = len(x), c.head_dim
    q = _linear(x, w, "q_proj").reshape(length, -1, dim)
    k, v = _linear(x, w, "k_proj"), _linear(x, w, "v_proj")
    pairs = c.rotary_dims // 2
    turns = c.rope_theta ** (-np.arange(pairs) / pairs)
    angles = np.arange(length)[:, None] * turns
    q, k = _rotated(q, angles[:, None]), _rotated(k, angles)
    out = np.empty_like(q)
    for first in range(0, length, QUERIES):
        rows = np.arange(first, min(first + QUERIES, length))
        oldest = max(0, first - c.past_window)
        keys = np.arange(oldest, rows[-1] + 1)
        scores = np.einsum("qhd,kd->hqk", q[rows], k[keys]) * dim**-0.5
        back = rows[:, None] - keys
        scores = np.where((back >= 0) & (back <= c.past_window), scores, -np.inf)
        powers = np.exp(scores - scores.max(-1, keepdims=True))
        out[rows] = np.einsum("hqk,kd->qhd", powers / powers.sum(-1, keepdims=True), v[keys])
    return _linear(out.reshape(length, -1), w, "o_proj")


def _rotated(x: Array, angles: Array) -> Array:
    pairs = angles.shape[-1]
    first, second, rest = np.split(x, [pairs, 2 * pairs], axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
