"""Decode steps of a whole model by Numba kernels: a few tokens at a time.

A step reads every weight once, and little else. Through MLX's operations it takes several times as
long as the memory does: hundreds of small operations are dispatched one by one. Here each layer is
one kernel over the weights as they lie.

It serves float32 weights in plain layers (or quantized ones with dequantized weights beside them),
a few tokens of one or more sequences, and a cache that continues. Everything else takes the model's
own path, with the same results within float32's accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rgemma.cpu import numba_runtime
from mlx_rgemma.cpu.arrays import View
from mlx_rgemma.cpu.fastmath import LOG2_E
from mlx_rgemma.cpu.layers import Embedding, Linear, QuantizedEmbedding, QuantizedLinear
from mlx_rgemma.cpu.parameter_guard import ParameterGuard
from mlx_rgemma.cpu.thread_pool import spin_between_tasks
from mlx_rgemma.griffin.cache import AttentionCache, GriffinCache, RecurrentCache
from mlx_rgemma.griffin.checks import check_token_ids
from mlx_rgemma.griffin.fused_projection import FusedInputBlock
from mlx_rgemma.griffin.layers import RecurrentBlock, ResidualBlock, RMSNorm
from mlx_rgemma.ops import rotary_angles
from mlx_rgemma.ops.rg_lru import log_a_base

MIN_WEIGHTS = 1 << 23
"""Elements of a model from which on the kernels pay: a smaller one stays in the caches."""
MAX_TOKENS = 12
"""Tokens, of all sequences, up to which they pay: for many, matrix products are faster."""
WEIGHTS_PER_THREAD = 1 << 18
"""Weights of a layer worth another thread: they take 50 us to read, a barrier takes 0.1."""


def decoder_of(model: Any) -> Decoder | None:
    """Return the decoder of a `griffin.model.Model`; None if it has none.

    It is kept on the model, and made anew when a parameter has been replaced.
    """
    guard, found = model.__dict__.get("_decoder", (None, None))
    if guard is None or not guard.unchanged():
        guard, found = ParameterGuard(model.model), None
        arrays = _plain_arrays(model.model)
        if arrays is not None and sum(x.size for x in arrays) >= MIN_WEIGHTS:
            found = Decoder(model)
        # A plain attribute: `nn.Module` neither saves nor trains it.
        object.__setattr__(model, "_decoder", (guard, found))
    return found


class Decoder:
    """The weights of a model as the kernels read them. From `decoder_of`."""

    def __init__(self, model: Any) -> None:
        griffin = model.model
        self.check_cache, self.window = model.check_cache, model.args.past_window
        self.cap = np.float32(model.args.logits_soft_cap)
        self.embedding = np.asarray(_matrix(griffin.embed_tokens))
        self.scale = np.float32(griffin.embedding_scale)
        self.frequencies = griffin._frequencies
        self.norm = _norm(griffin.final_norm)
        self.layers = [
            _RecurrentLayer(layer)
            if isinstance(layer.temporal_block, RecurrentBlock)
            else _AttentionLayer(layer)
            for layer in griffin.layers
        ]

    def __call__(
        self, tokens: mx.array, cache: Sequence[GriffinCache], *, last_only: bool = False
    ) -> mx.array | None:
        """Advance a cache by tokens, (B, L).

        Returns:
            Logits, (B, L, vocab_size), or of the last tokens alone (B, 1, vocab_size); None if the
            kernels do not support the call.
        """
        if not 0 < tokens.size <= MAX_TOKENS or tokens.shape[1] > self.window:
            return None
        self.check_cache(cache)
        if any(c.batch_size != tokens.shape[0] for c in cache) or not _is_decoding(cache):
            return None
        try:
            ids: Any = tokens.tolist()
        except ValueError:  # within `mx.compile`, where they have no value
            return None
        ids = [check_token_ids(sequence, len(self.embedding)) for sequence in ids]
        return self._step(ids, cache, last_only)

    def _step(
        self, tokens: list[list[int]], cache: Sequence[GriffinCache], last_only: bool
    ) -> mx.array:
        batch, length, vocab_size = len(tokens), len(tokens[0]), len(self.embedding)
        x = self.embedding[np.array(tokens).flatten()] * self.scale
        positions = mx.array(cache[0].positions)[:, None] + mx.arange(length)
        angles = rotary_angles(positions, self.frequencies)
        cos, sin = (np.asarray(mx.contiguous(z)).reshape(len(x), -1) for z in angles)
        with spin_between_tasks():
            state: Any
            for layer, state in zip(self.layers, cache, strict=True):
                layer(x, state, cos, sin)
                state.advance(length)
            if last_only:
                x = np.ascontiguousarray(x[length - 1 :: length])
            logits = np.empty((len(x), vocab_size), np.float32)
            arguments = x, self.norm, self.embedding, self.cap, logits
            numba_runtime.run("lm_head", vocab_size, *arguments)
        mx.async_eval([c.kv for c in cache if isinstance(c, AttentionCache)])
        return mx.array(logits).reshape(batch, -1, vocab_size)


class _RecurrentLayer:
    def __init__(self, layer: ResidualBlock) -> None:
        self.block: Any = layer.temporal_block
        block, conv, unit = self.block, self.block.conv_1d, self.block.rg_lru
        arrays = [
            *(conv.weight[..., 0].T, conv.bias),
            *(unit.input_gate_weight, unit.input_gate_bias.flatten()),
            *(unit.recurrent_gate_weight, unit.recurrent_gate_bias.flatten()),
            log_a_base(unit.recurrent_param) * LOG2_E,
        ]
        recurrence = tuple(np.asarray(mx.contiguous(z)) for z in arrays)
        self.weights = _in_proj(layer), recurrence, _linear(block.linear_out), _mlp(layer)
        self.size = _size(self.weights)

    def __call__(self, x: View, state: RecurrentCache, _cos: View, _sin: View) -> None:
        """The tokens' residual stream, (B L, D), which changes, and their layer's state."""
        conv, h = np.array(state.conv), np.array(state.h)
        batch, width = h.shape
        yx, out = (np.empty((len(x), n), np.float32) for n in (2 * width, width))
        mlp_hidden = _mlp_hidden(x, self.weights)
        made = (conv, h, yx, out, mlp_hidden)
        numba_runtime.run_region("recurrent_layer", _threads(self.size), x, *self.weights, *made)
        if state.history is not None:
            read = mx.array(yx[:, width:]).reshape(batch, -1, width)
            self.block.record_inputs(read, None, state)
        state.conv, state.h = mx.array(conv), mx.array(h)


class _AttentionLayer:
    def __init__(self, layer: ResidualBlock) -> None:
        block: Any = layer.temporal_block
        self.heads, self.dim, self.window = block.num_heads, block.head_dim, block.window
        self.weights = _in_proj(layer), _linear(block.o_proj), _mlp(layer)
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
        heads, dim, threads = self.heads, self.dim, _threads(self.size)
        splits = (threads, heads)
        shapes = (heads + 2, dim), splits, splits, (*splits, dim), (heads, dim)
        qkv, *made = [np.empty((len(x), *shape), np.float32) for shape in shapes]
        place = (cos, sin, np.asarray(state.kv), state.write_pos, seen, scale)
        mlp_hidden = _mlp_hidden(x, self.weights)
        numba_runtime.run_region(
            "attention_layer", threads, x, *self.weights, *place, qkv, *made, mlp_hidden
        )
        del place  # a second reference would make the write copy the ring
        kv = mx.array(qkv[:, heads:]).reshape(batch, length, 2, dim)
        state.ring = state.ring.appended(kv.swapaxes(1, 2))


def _is_decoding(cache: Sequence[GriffinCache]) -> bool:
    """Return whether all sequences of an fp32 cache are at their second token or later."""
    return all(c.lengths is None and min(c.positions) > 0 for c in cache) and all(
        (c.conv if isinstance(c, RecurrentCache) else c.kv).dtype == mx.float32 for c in cache
    )


def _plain_arrays(model: Any) -> list[mx.array] | None:
    """A model's arrays, if a `Decoder` can be made of them; else None."""
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
        dequantized: mx.array | None = module.dequantized
        return dequantized
    return None


def _fused(block: FusedInputBlock) -> Any:
    """Return the fused projection of a block's shared input, while it is current."""
    fused = block.fused_projection()
    return None if fused is None else fused.layer


def _linear(module: Any) -> tuple[View, View]:
    """Weight (out, in) and bias (out,) of a layer that is plain."""
    matrix: Any = _matrix(module)
    weight = np.asarray(mx.contiguous(matrix))
    bias = np.asarray(module["bias"]) if "bias" in module else np.zeros(len(weight), np.float32)
    return weight, bias


def _joint(block: FusedInputBlock) -> tuple[View, View]:
    return _linear(_fused(block))


def _in_proj(layer: ResidualBlock) -> tuple[Any, ...]:
    """The norm before a temporal block, and the joint projection of its input."""
    return *_norm(layer.temporal_pre_norm), *_joint(layer.temporal_block)


def _mlp(layer: ResidualBlock) -> tuple[Any, ...]:
    mlp = layer.mlp_block
    return *_norm(layer.channel_pre_norm), *_joint(mlp), *_linear(mlp.down_proj)


def _size(weights: Sequence[Any]) -> int:
    return sum(z.size for part in weights for z in part if isinstance(z, np.ndarray))


def _threads(size: int) -> int:
    """Return the number of threads that pays for a layer with this number of weights."""
    return max(min(numba_runtime.max_region_threads(), size // WEIGHTS_PER_THREAD), 1)


def _mlp_hidden(x: View, weights: Sequence[Any]) -> View:
    """Return space for the hidden channels of an MLP, whose weights are the last."""
    *_, down, _bias = weights[-1]
    return np.empty((len(x), down.shape[1]), np.float32)


def _norm(norm: RMSNorm) -> tuple[View, np.float32]:
    return np.asarray(1.0 + norm.weight), np.float32(norm.eps)
