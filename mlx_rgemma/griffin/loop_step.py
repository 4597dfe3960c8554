"""A decode step on a Linux CPU by compiled loops: a token a row through a whole model.

A step reads every weight once, and little else. Through MLX's operations that takes several times
as long as the memory does: the BLAS copies a matrix into panels before it multiplies a single row
with it, and hundreds of small operations are handed out one by one. Here each part of a layer is a
loop over the weights as they lie.

It serves a model with float32 weights in plain layers (or quantized ones that are held in float32
too), a few sequences, for all of which each weight is read once, and a state that goes on.
Everything else takes the model's own way, which gives the same within float32's accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rgemma.griffin.cache import AttentionCache, GriffinCache, RecurrentCache
from mlx_rgemma.griffin.layers import LocalAttentionBlock, RecurrentBlock, ResidualBlock, RMSNorm
from mlx_rgemma.griffin.linear import Embedding, Linear, QuantizedEmbedding, QuantizedLinear
from mlx_rgemma.griffin.projection import SharedInputBlock
from mlx_rgemma.ops import loops, rotary_angles
from mlx_rgemma.ops.loops import View
from mlx_rgemma.ops.processor import cores
from mlx_rgemma.ops.rg_lru import log2_a_at_open_gate
from mlx_rgemma.ops.team import attentive

LEAST_WEIGHTS = 1 << 23
"""Elements of a model from which on it is worth it: a smaller one stays in the caches."""
MOST_ROWS = 8
"""Sequences up to which it is worth it: for many, products of matrices are."""
SHARED_PRODUCTS = 1 << 19
"""Products from which on all cores share them: another thread is there after 50 us."""


class LoopStep:
    """The weights of a model as loops read them.

    Args:
        model: A `griffin.model.Griffin`.
        arrays: Its arrays, from `plain_arrays`.
        cap: Soft cap of the logits; 0 for none.
    """

    def __init__(self, model: Any, arrays: Sequence[mx.array], cap: float) -> None:
        self.arrays = arrays
        self.cap = np.float32(cap)
        self.embedding = np.asarray(_matrix(model.embed_tokens))
        self.scale = np.float32(model.embedding_scale)
        self.frequencies = model._frequencies
        self.norm = _norm(model.final_norm)
        self.layers = [_Layer(layer) for layer in model.layers]

    def __call__(self, tokens: list[int], cache: Sequence[GriffinCache]) -> mx.array:
        """Logits of a token's successor, (rows, words); the state goes on by a token a row."""
        x = self.embedding[tokens] * self.scale
        angles = rotary_angles(mx.array(cache[0].positions)[:, None], self.frequencies)
        cos, sin = (np.asarray(z).reshape(len(x), -1) for z in angles)
        logits = np.empty((len(x), len(self.embedding)), np.float32)
        words, size = len(self.embedding), self.embedding.size
        with attentive():
            for layer, state in zip(self.layers, cache, strict=True):
                layer(x, state, cos, sin)
                state.advance(1)
            _run("capped_scores", words, size, x, *self.norm, self.embedding, self.cap, logits)
        return mx.array(logits)


class _Layer:
    """A residual block."""

    def __init__(self, layer: ResidualBlock) -> None:
        block, mlp = layer.temporal_block, layer.mlp_block
        self.norms = _norm(layer.temporal_pre_norm), _norm(layer.channel_pre_norm)
        self.joint = _joint(block)
        self.mixer: _Recurrence | _Attention
        if isinstance(block, RecurrentBlock):
            self.mixer, out = _Recurrence(block), block.linear_out
        else:
            self.mixer, out = _Attention(block), block.o_proj
        self.out, self.gate_up, self.down = _linear(out), _joint(mlp), _linear(mlp.down_proj)

    def __call__(self, x: View, state: Any, cos: View, sin: View) -> None:
        """The tokens' residual stream, (R, D), which changes, and their layer's state."""
        rows, width = x.shape
        outputs, channels = len(self.joint[0]), len(self.gate_up[0]) // 2
        projected = np.empty((rows, outputs), np.float32)
        inner = np.empty((rows, channels), np.float32)
        size = self.joint[0].size
        _run("normalized_product", outputs, size, x, *self.norms[0], *self.joint, projected)
        mixed = self.mixer(projected, state, cos, sin)
        _run("added_product", width, self.out[0].size, mixed, *self.out, x)
        size = self.gate_up[0].size
        _run("normalized_mlp", channels, size, x, *self.norms[1], *self.gate_up, inner)
        _run("added_product", width, self.down[0].size, inner, *self.down, x)


class _Recurrence:
    def __init__(self, block: RecurrentBlock) -> None:
        conv, unit = block.conv_1d, block.rg_lru
        arrays = [
            *(conv.weight[..., 0].T, conv.bias),
            *(unit.input_gate_weight, unit.input_gate_bias.flatten()),
            *(unit.recurrent_gate_weight, unit.recurrent_gate_bias.flatten()),
            log2_a_at_open_gate(unit.recurrent_param),
        ]
        self.weights = [np.asarray(mx.contiguous(z)) for z in arrays]

    def __call__(self, yx: View, state: RecurrentCache, _cos: View, _sin: View) -> View:
        conv, h = np.array(state.conv), np.array(state.h)
        out = np.empty(h.shape, np.float32)
        share = loops.run if len(h) > 1 else _alone
        share("recurrent_step", len(h), yx, *self.weights, conv, h, out)
        state.conv, state.h = mx.array(conv), mx.array(h)
        return out


class _Attention:
    def __init__(self, block: LocalAttentionBlock) -> None:
        self.heads, self.dim, self.window = block.num_heads, block.head_dim, block.window

    def __call__(self, qkv: View, state: AttentionCache, cos: View, sin: View) -> View:
        heads = qkv.reshape(len(qkv), self.heads + 2, self.dim)
        _alone("rotate", len(heads), heads, self.heads + 1, cos, sin)
        state.ring = state.ring.appended(mx.array(heads[:, self.heads :])[:, :, None])
        rings = np.asarray(state.kv)  # not held on to: the next token is written in place
        newest, scale = (state.head - 1) % rings.shape[2], np.float32(self.dim**-0.5)
        out = np.empty((len(heads), self.heads, self.dim), np.float32)
        for row, ring, position, into in zip(heads, rings, state.positions, out, strict=True):
            seen = min(position, self.window) + 1
            products = 2 * seen * row.size
            parts = min(cores(), seen) if products >= SHARED_PRODUCTS else 1
            found = [np.empty((parts, self.heads, *n), np.float32) for n in ((), (), (self.dim,))]
            _run("ring_step", parts, products, row[: self.heads], ring, newest, seen, scale, *found)
            _alone("join_parts", self.heads, *found, into)
        return out.reshape(len(out), -1)


def continues(cache: Sequence[GriffinCache]) -> bool:
    """Whether all sequences of a state are at their second token or later, and nothing more."""
    return all(
        c.history is None and c.lengths is None and min(c.positions) > 0 for c in cache
    ) and all(
        (c.conv if isinstance(c, RecurrentCache) else c.kv).dtype == mx.float32 for c in cache
    )


def plain_arrays(model: Any) -> list[mx.array] | None:
    """A model's arrays, as long as which a `LoopStep` holds; None if it cannot be made.

    Args:
        model: A `griffin.model.Griffin`.
    """
    found = [_matrix(model.embed_tokens), model.final_norm.weight]
    for layer in model.layers:
        block, mlp = layer.temporal_block, layer.mlp_block
        found += [layer.temporal_pre_norm.weight, layer.channel_pre_norm.weight]
        recurrent = isinstance(block, RecurrentBlock)
        outs = (block.linear_out if recurrent else block.o_proj, mlp.down_proj)
        for module in (_fused(block), _fused(mlp), *outs):
            found += [_matrix(module), *([module["bias"]] if "bias" in (module or ()) else [])]
        if recurrent:
            found += [*block.conv_1d.values(), *block.rg_lru.values()]
    if any(not isinstance(x, mx.array) or x.dtype != mx.float32 for x in found):
        return None
    return found


def _matrix(module: Any) -> mx.array | None:
    """The float32 weights of a layer of this package's; None of any other."""
    if type(module) in (Linear, Embedding):
        weight: mx.array = module["weight"]
        return weight
    if type(module) in (QuantizedLinear, QuantizedEmbedding):
        expanded: mx.array | None = module.expanded
        return expanded
    return None


def _fused(block: SharedInputBlock) -> Any:
    """The joint projection of a block's shared input, while it serves."""
    fused = block.__dict__.get("_fused")
    if fused is None or not fused.serves([block[name] for name in block.shared]):
        return None
    return fused.joint


def _linear(module: Any) -> tuple[View, View]:
    """Weight (out, in) and bias (out,) of a layer that is plain."""
    matrix: Any = _matrix(module)
    weight = np.asarray(mx.contiguous(matrix))
    bias = np.asarray(module["bias"]) if "bias" in module else np.zeros(len(weight), np.float32)
    return weight, bias


def _joint(block: SharedInputBlock) -> tuple[View, View]:
    return _linear(_fused(block))


def _norm(norm: RMSNorm) -> tuple[View, np.float32]:
    return np.asarray(1.0 + norm.weight), np.float32(norm.eps)


def _run(name: str, units: int, products: int, *arguments: Any) -> None:
    """Run a loop of so many products: on all cores, or on this one if they are few."""
    (loops.run if products >= SHARED_PRODUCTS else _alone)(name, units, *arguments)


def _alone(name: str, units: int, *arguments: Any) -> None:
    loops.alone(name, 0, units, *arguments)
