"""The blocks of Griffin (arXiv:2402.19427, section 2), with Hugging Face's parameter names.

The residual stream is float32. Matrix products run in the dtype of the weights. Norms, gates,
recurrence and softmax are always float32.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_rgemma.griffin.cache import AttentionCache, RecurrentCache
from mlx_rgemma.griffin.config import RECURRENT, GriffinConfig
from mlx_rgemma.griffin.fused_projection import FusedInputBlock
from mlx_rgemma.griffin.sequence_info import SequenceInfo
from mlx_rgemma.ops import (
    RecurrentWeights,
    add_rms_norm,
    block_diagonal,
    causal_conv1d,
    decode_attention,
    gated_gelu,
    prefill_attention,
    recurrent_decode,
    residual_add,
    rg_lru,
    rms_norm,
    token_types,
)


class RMSNorm(nn.Module):
    """``x / rms(x) * (1 + weight)``, computed in fp32, returned in the dtype of the weight."""

    def __init__(self, dims: int, eps: float) -> None:
        super().__init__()
        self.weight = mx.zeros((dims,))
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        return rms_norm(x, self.weight, self.eps, dtype=self.weight.dtype)

    def add_and_norm(self, x: mx.array, delta: mx.array) -> tuple[mx.array, mx.array]:
        """Return ``x + delta`` and its norm."""
        return add_rms_norm(x, delta, self.weight, self.eps, dtype=self.weight.dtype)


class Conv1d(nn.Module):
    """Weights of the causal depthwise convolution, stored as mlx-lm does: (D, K, 1)."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.weight = mx.zeros((channels, kernel_size, 1))
        self.bias = mx.zeros((channels,))

    def __call__(
        self, x: mx.array, info: SequenceInfo, state: mx.array | None
    ) -> tuple[mx.array, mx.array]:
        return causal_conv1d(
            x,
            self.weight,
            self.bias,
            state,
            segment_pos=info.segment_pos,
            lengths=info.lengths,
        )


class RGLRU(nn.Module):
    """The Real-Gated Linear Recurrent Unit with its two block-diagonal gates."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        block = width // num_heads
        self.recurrent_param = mx.zeros((width,))
        self.input_gate_weight = mx.zeros((num_heads, block, block))
        self.input_gate_bias = mx.zeros((num_heads, block))
        self.recurrent_gate_weight = mx.zeros((num_heads, block, block))
        self.recurrent_gate_bias = mx.zeros((num_heads, block))

    def __call__(
        self, x: mx.array, info: SequenceInfo, h0: mx.array | None
    ) -> tuple[mx.array, mx.array]:
        return rg_lru(
            x,
            block_diagonal(x, self.input_gate_weight),
            block_diagonal(x, self.recurrent_gate_weight),
            self.recurrent_param,
            h0,
            reset=info.reset,
            mask=info.mask,
            input_gate_bias=self.input_gate_bias.flatten(),
            recurrent_gate_bias=self.recurrent_gate_bias.flatten(),
        )


class RecurrentBlock(FusedInputBlock):
    """``linear_out(gelu(linear_y(x)) * RG-LRU(conv(linear_x(x))))``."""

    shared = ("linear_y", "linear_x")

    def __init__(self, config: GriffinConfig) -> None:
        super().__init__()
        width, lru_width = config.hidden_size, config.lru_width
        self.linear_y = nn.Linear(width, lru_width)
        self.linear_x = nn.Linear(width, lru_width)
        self.linear_out = nn.Linear(lru_width, width)
        self.conv_1d = Conv1d(lru_width, config.conv1d_width)
        self.rg_lru = RGLRU(lru_width, config.num_attention_heads)

    def __call__(
        self,
        x: mx.array,
        info: SequenceInfo,
        cache: RecurrentCache | None,
        *,
        last_only: bool = False,
    ) -> mx.array:
        y, x = self.project(x)
        if cache is not None and cache.history is not None:
            short = info.is_short
            types = info.token_type if short else token_types(info.reset, info.mask)
            self.record_inputs(x, types, cache)
        if cache is not None and info.is_short:
            out, cache.conv, cache.h = recurrent_decode(
                y, x, self._weights(), cache.conv, cache.h, info.token_type
            )
            return self.linear_out(out[:, -1:] if last_only else out)
        x, conv = self.conv_1d(x, info, None if cache is None else cache.conv)
        x, h = self.rg_lru(x, info, None if cache is None else cache.h)
        if cache is not None:
            cache.conv, cache.h = conv, h
        if last_only:
            y, x = y[:, -1:], x[:, -1:]
        return self.linear_out(gated_gelu(y, x))

    def record_inputs(
        self, x: mx.array, token_type: mx.array | None, cache: RecurrentCache
    ) -> None:
        """Record how to restore the state after the first tokens of a call: by recomputing them.

        Args:
            x: (B, L, lru_width). The convolution's inputs.
            token_type: (1 or B, L), from `token_types`; None if all tokens are normal.
            cache: The cache before the call.
        """
        conv, h = cache.conv, cache.h

        def undo(cache: RecurrentCache, kept: int) -> None:
            cache.conv, cache.h = conv, h
            if kept:
                first = x[:, :kept]
                types = token_type
                if types is not None and types.ndim > 1:
                    types = types[:, :kept]
                _, cache.conv, cache.h = recurrent_decode(
                    first, first, self._weights(), conv, h, types
                )

        cache.record_call(x.shape[1], undo)

    def _weights(self) -> RecurrentWeights:
        conv, rg_lru = self.conv_1d, self.rg_lru
        return RecurrentWeights(
            conv.weight,
            conv.bias,
            rg_lru.input_gate_weight,
            rg_lru.input_gate_bias,
            rg_lru.recurrent_gate_weight,
            rg_lru.recurrent_gate_bias,
            rg_lru.recurrent_param,
        )


class LocalAttentionBlock(FusedInputBlock):
    """Sliding-window attention of many query heads to one key/value head."""

    shared = ("q_proj", "k_proj", "v_proj")

    def __init__(self, config: GriffinConfig) -> None:
        super().__init__()
        width, bias = config.hidden_size, config.attention_bias
        self.num_heads = config.num_attention_heads
        self.head_dim = config.head_dim
        self.window = config.past_window
        self.q_proj = nn.Linear(width, self.num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, width, bias=True)

    def __call__(
        self,
        x: mx.array,
        info: SequenceInfo,
        cache: AttentionCache | None,
        *,
        last_only: bool = False,
    ) -> mx.array:
        batch, length, _ = x.shape
        q, k, v = self.project(x)
        q = q.reshape(batch, length, self.num_heads, self.head_dim).swapaxes(1, 2)
        k, v = k[:, None], v[:, None]
        if cache is not None and cache.history is not None:
            cache.save_slots(length)
        ring = None if cache is None or info.fresh else cache.ring
        options: dict[str, Any] = {
            "window": self.window,
            "max_lookback": info.max_lookback,
            "ring": ring,
            "cached_len": info.cached_len,
        }
        if cache is not None and info.is_decode:
            out, cache.ring = decode_attention(q, k, v, info.cos, info.sin, **options)
        else:
            options["last_only"] = last_only
            out, kv = prefill_attention(q, k, v, info.cos, info.sin, **options)
            if cache is not None:
                cache.write(kv)
        return self.o_proj(out.swapaxes(1, 2).reshape(batch, out.shape[2], -1))


class MLPBlock(FusedInputBlock):
    """``down(gelu(gate(x)) * up(x))``."""

    shared = ("gate_proj", "up_proj")

    def __init__(self, config: GriffinConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size // 2
        self.gate_proj = nn.Linear(width, inner)
        self.up_proj = nn.Linear(width, inner)
        self.down_proj = nn.Linear(inner, width)

    def __call__(self, x: mx.array) -> mx.array:
        gate, up = self.project(x)
        return self.down_proj(gated_gelu(gate, up))


class ResidualBlock(nn.Module):
    """A temporal block and an MLP, each after a norm and added to the residual stream."""

    def __init__(self, config: GriffinConfig, temporal_block_type: str) -> None:
        super().__init__()
        self.temporal_block_type = temporal_block_type
        self.temporal_pre_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.temporal_block: RecurrentBlock | LocalAttentionBlock
        if temporal_block_type == RECURRENT:
            self.temporal_block = RecurrentBlock(config)
        else:
            self.temporal_block = LocalAttentionBlock(config)
        self.channel_pre_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp_block = MLPBlock(config)

    def fuse_projections(self) -> None:
        """Fuse the projections that read the same input."""
        self.temporal_block.fuse_projections()
        self.mlp_block.fuse_projections()

    def __call__(
        self,
        x: mx.array,
        info: SequenceInfo,
        cache: Any = None,
        *,
        last_only: bool = False,
    ) -> mx.array:
        x_in, block = self.temporal_pre_norm(x), self.temporal_block
        delta = block(x_in, info, cache, last_only=last_only)
        if last_only:  # the other positions are not needed
            x = x[:, -1:]
        x, normalized = self.channel_pre_norm.add_and_norm(x, delta)
        return residual_add(x, self.mlp_block(normalized))
