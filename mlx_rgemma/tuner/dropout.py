"""Dropout for a model that has none: on what each block adds to the stream, and on tokens."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_rgemma.griffin.model import Model


def add_dropout(model: Model, rate: float) -> None:
    """Have a model drop values while it is trained; its parameters keep their names.

    The last projection of every temporal block and MLP sets each value to 0 with probability
    `rate` and scales the others by ``1 / (1 - rate)``; the embedding does so with whole tokens, so
    that a text cannot be told by its every word. A model in evaluation mode computes as before,
    and so does the head, which shares the embedding's weights.

    Args:
        model: The model, with plain (not quantized) layers.
        rate: From 0 to less than 1.
    """
    model.model.embed_tokens = _DropoutEmbedding(model.model.embed_tokens, rate)
    for layer in model.layers:
        block, mlp = layer.temporal_block, layer.mlp_block
        last = "linear_out" if "linear_out" in block else "o_proj"
        setattr(block, last, _DropoutLinear(getattr(block, last), rate))
        mlp.down_proj = _DropoutLinear(mlp.down_proj, rate)


class _DropoutLinear(nn.Linear):
    def __init__(self, linear: nn.Linear, rate: float) -> None:
        nn.Module.__init__(self)
        self.weight = linear.weight
        if "bias" in linear:
            self.bias = linear.bias
        self._rate = rate

    def __call__(self, x: mx.array) -> mx.array:
        x = super().__call__(x)
        return drop(x, self._rate) if self.training else x


class _DropoutEmbedding(nn.Embedding):
    def __init__(self, embedding: nn.Embedding, rate: float) -> None:
        nn.Module.__init__(self)
        self.weight = embedding.weight
        self._rate = rate

    def __call__(self, x: mx.array) -> mx.array:
        x = super().__call__(x)
        return drop(x, self._rate, (*x.shape[:-1], 1)) if self.training else x


def drop(x: mx.array, rate: float, shape: tuple[int, ...] | None = None) -> mx.array:
    """Set values to 0 with probability `rate`, scale the others by ``1 / (1 - rate)``.

    Args:
        x: Any float.
        rate: From 0 to less than 1.
        shape: Broadcast with that of `x`: values that share a place in it share their fate.
    """
    kept = mx.random.bernoulli(1.0 - rate, x.shape if shape is None else shape)
    return mx.where(kept, x * (1.0 / (1.0 - rate)), mx.array(0.0, x.dtype))
