"""Dropout on every residual branch and on whole input tokens."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_rgemma.griffin.model import Model
from mlx_rgemma.griffin.parameters import Role, modules_of


def add_dropout(model: Model, rate: float) -> None:
    """Add dropout to a model, in training mode only; its parameters keep their names.

    The output projection of every temporal block and MLP sets values to 0 with probability `rate`
    and scales the others by ``1 / (1 - rate)``; the embedding does so with whole tokens. The LM
    head, which shares the embedding's weights, has no dropout.

    Args:
        model: The model; its layers are not quantized.
        rate: From 0 to less than 1.
    """
    model.model.embed_tokens = _DropoutEmbedding(model.model.embed_tokens, rate)
    for layer in model.layers:
        for block in (layer.temporal_block, layer.mlp_block):
            for name in modules_of(Role.OUT_PROJ):
                if name in block:
                    block[name] = _DropoutLinear(block[name], rate)


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
    """Set values to 0 with probability `rate` and scale the others by ``1 / (1 - rate)``.

    Args:
        x: Any float.
        rate: From 0 to less than 1.
        shape: Shape of the mask, broadcast to that of `x`.
    """
    kept = mx.random.bernoulli(1.0 - rate, x.shape if shape is None else shape)
    return mx.where(kept, x * (1.0 / (1.0 - rate)), mx.array(0.0, x.dtype))
