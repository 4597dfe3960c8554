"""A few tokens on a Linux CPU by compiled loops: a decode step, or the check of a draft.

A step reads every weight once, and little else. Through MLX's operations that takes several times
as long as the memory does: the BLAS copies a matrix into panels before it multiplies a single row
with it, and hundreds of small operations are handed out one by one. Here each layer is a loop over
the weights as they lie.

It serves a model with float32 weights in plain layers (or quantized ones that are held in float32
too), a few tokens of one or more sequences, for all of which each weight is read once, and a state
that goes on. Everything else takes the model's own way, which gives the same within float32's
accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rgemma.griffin.cache import AttentionCache, GriffinCache, RecurrentCache
from mlx_rgemma.griffin.layers import RecurrentBlock, ResidualBlock, RMSNorm
from mlx_rgemma.griffin.linear import Embedding, Linear, QuantizedEmbedding, QuantizedLinear
from mlx_rgemma.griffin.projection import SharedInputBlock
from mlx_rgemma.ops import loops, rotary_angles
from mlx_rgemma.ops.loops import View
from mlx_rgemma.ops.rg_lru import log2_a_at_open_gate
from mlx_rgemma.ops.team import attentive

LEAST_WEIGHTS = 1 << 23
"""Elements of a model from which on it is worth it: a smaller one stays in the caches."""
MOST_TOKENS = 12
"""Tokens, of all sequences, up to which it is worth it: for many, products of matrices are."""
WEIGHTS_A_CORE = 1 << 18
"""Weights of a layer worth another core: they take 50 us to read, and two cores meet in 0.1."""


def loop_step(model: Any, cap: float, least: int) -> LoopStep | None:
    """A model's steps by loops; None where it is not made of plain float32 layers, or too small.

    Args:
        model: A `griffin.model.Griffin`.
        cap: Soft cap of the logits; 0 for none.
        least: Elements of its weights from which on it is worth it.
    """
    arrays = _plain_arrays(model)
    if arrays is None or sum(x.size for x in arrays) < least:
        return None
    return LoopStep(model, cap)


class LoopStep:
    """The weights of a model as loops read them. From `loop_step`."""

    def __init__(self, model: Any, cap: float) -> None:
        self.cap = np.float32(cap)
        self.embedding = np.asarray(_matrix(model.embed_tokens))
        self.scale = np.float32(model.embedding_scale)
        self.frequencies = model._frequencies
        self.norm = _norm(model.final_norm)
        self.layers = [
            _RecurrentLayer(layer)
            if isinstance(layer.temporal_block, RecurrentBlock)
            else _AttentionLayer(layer)
            for layer in model.layers
        ]

    def __call__(
        self, tokens: list[list[int]], cache: Sequence[GriffinCache], *, last_only: bool = False
    ) -> mx.array:
        """Have a state go on by tokens, (B, L).

        Returns:
            Logits of their successors, (B, L, words), of the last ones alone (B, 1, words).
        """
        batch, length, words = len(tokens), len(tokens[0]), len(self.embedding)
        x = self.embedding[np.array(tokens).flatten()] * self.scale
        positions = mx.array(cache[0].positions)[:, None] + mx.arange(length)
        angles = rotary_angles(positions, self.frequencies)
        cos, sin = (np.asarray(mx.contiguous(z)).reshape(len(x), -1) for z in angles)
        with attentive():
            state: Any
            for layer, state in zip(self.layers, cache, strict=True):
                layer(x, state, cos, sin)
                state.advance(length)
            if last_only:
                x = np.ascontiguousarray(x[length - 1 :: length])
            logits = np.empty((len(x), words), np.float32)
            loops.run("capped_scores", words, x, self.norm, self.embedding, self.cap, logits)
        mx.async_eval([c.kv for c in cache if isinstance(c, AttentionCache)])
        return mx.array(logits).reshape(batch, -1, words)


class _RecurrentLayer:
    def __init__(self, layer: ResidualBlock) -> None:
        self.block: Any = layer.temporal_block
        block, conv, unit = self.block, self.block.conv_1d, self.block.rg_lru
        arrays = [
            *(conv.weight[..., 0].T, conv.bias),
            *(unit.input_gate_weight, unit.input_gate_bias.flatten()),
            *(unit.recurrent_gate_weight, unit.recurrent_gate_bias.flatten()),
            log2_a_at_open_gate(unit.recurrent_param),
        ]
        recurrence = tuple(np.asarray(mx.contiguous(z)) for z in arrays)
        self.weights = _entry(layer), recurrence, _linear(block.linear_out), _mlp(layer)
        self.size = _size(self.weights)

    def __call__(self, x: View, state: RecurrentCache, _cos: View, _sin: View) -> None:
        """The tokens' residual stream, (B L, D), which changes, and their layer's state."""
        conv, h = np.array(state.conv), np.array(state.h)
        batch, width = h.shape
        yx, out = (np.empty((len(x), n), np.float32) for n in (2 * width, width))
        inner = _inner(x, self.weights)
        made = (conv, h, yx, out, inner)
        loops.together("recurrent_layer", _crew(self.size), x, *self.weights, *made)
        if state.history is not None:
            read = mx.array(yx[:, width:]).reshape(batch, -1, width)
            self.block.remember(read, None, state)
        state.conv, state.h = mx.array(conv), mx.array(h)


class _AttentionLayer:
    def __init__(self, layer: ResidualBlock) -> None:
        block: Any = layer.temporal_block
        self.heads, self.dim, self.window = block.num_heads, block.head_dim, block.window
        self.weights = _entry(layer), _linear(block.o_proj), _mlp(layer)
        self.size = _size(self.weights)

    def __call__(self, x: View, state: AttentionCache, cos: View, sin: View) -> None:
        """As for a recurrent layer; tokens are put into the ring when that is next looked at."""
        batch = state.batch_size
        length = len(x) // batch
        if state.history is not None:
            state.save_slots(length)
        positions = np.array(state.positions)[:, None]
        seen = np.minimum(positions, self.window - np.arange(length)).flatten()
        scale = np.float32(self.dim**-0.5)
        heads, dim, crew = self.heads, self.dim, _crew(self.size)
        parts = (crew, heads)
        shapes = (heads + 2, dim), parts, parts, (*parts, dim), (heads, dim)
        qkv, *made = [np.empty((len(x), *shape), np.float32) for shape in shapes]
        place = (cos, sin, np.asarray(state.kv), state.head, seen, scale)
        inner = _inner(x, self.weights)
        loops.together("attention_layer", crew, x, *self.weights, *place, qkv, *made, inner)
        del place  # nobody else is to hold the ring when the tokens are written
        kv = mx.array(qkv[:, heads:]).reshape(batch, length, 2, dim)
        state.ring = state.ring.appended(kv.swapaxes(1, 2))


def continues(cache: Sequence[GriffinCache]) -> bool:
    """Whether all sequences of a state are at their second token or later, and nothing more."""
    return all(c.lengths is None and min(c.positions) > 0 for c in cache) and all(
        (c.conv if isinstance(c, RecurrentCache) else c.kv).dtype == mx.float32 for c in cache
    )


def _plain_arrays(model: Any) -> list[mx.array] | None:
    """A model's arrays, if a `LoopStep` can be made of them; else None."""
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


def _entry(layer: ResidualBlock) -> tuple[Any, ...]:
    """The norm before a temporal block, and the joint projection of its input."""
    return *_norm(layer.temporal_pre_norm), *_joint(layer.temporal_block)


def _mlp(layer: ResidualBlock) -> tuple[Any, ...]:
    mlp = layer.mlp_block
    return *_norm(layer.channel_pre_norm), *_joint(mlp), *_linear(mlp.down_proj)


def _size(weights: Sequence[Any]) -> int:
    return sum(z.size for part in weights for z in part if isinstance(z, np.ndarray))


def _crew(size: int) -> int:
    """Cores that a layer of so many weights is worth."""
    return max(min(loops.crew(), size // WEIGHTS_A_CORE), 1)


def _inner(x: View, weights: Sequence[Any]) -> View:
    """Room for the channels within an MLP, whose weights are the last."""
    *_, down, _bias = weights[-1]
    return np.empty((len(x), down.shape[1]), np.float32)


def _norm(norm: RMSNorm) -> tuple[View, np.float32]:
    return np.asarray(1.0 + norm.weight), np.float32(norm.eps)
