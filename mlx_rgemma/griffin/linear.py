"""Linear layers and embeddings that multiply through `ops.linear`.

They are MLX's own classes, by name, parameters and inheritance: whatever quantizes, adapts, shards
or saves those takes these.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_rgemma.ops import linear, quantized_linear


class Linear(nn.Linear):
    """``x @ weight.T + bias``."""

    def __call__(self, x: mx.array) -> mx.array:
        return linear(x, self["weight"], self.get("bias"))

    def to_quantized(self, *args: Any, **kwargs: Any) -> nn.Module:
        return _quantized(super().to_quantized(*args, **kwargs))


class QuantizedLinear(nn.QuantizedLinear):
    """The same with quantized weights."""

    def __call__(self, x: mx.array) -> mx.array:
        y = _product(self, x)
        return y + self["bias"] if "bias" in self else y


class Embedding(nn.Embedding):
    """Rows of a table by index; `as_linear` multiplies with them."""

    def as_linear(self, x: mx.array) -> mx.array:
        return linear(x, self["weight"])

    def to_quantized(self, *args: Any, **kwargs: Any) -> nn.Module:
        return _quantized(super().to_quantized(*args, **kwargs))


class QuantizedEmbedding(nn.QuantizedEmbedding):
    """The same with a quantized table."""

    def as_linear(self, x: mx.array) -> mx.array:
        return _product(self, x)


def _quantized(module: nn.Module) -> nn.Module:
    """What MLX made of a layer, as the class of this file that it corresponds to."""
    for ours in (QuantizedLinear, QuantizedEmbedding):
        if type(module) is ours.__base__:
            module.__class__ = ours
    return module


def _product(module: Any, x: mx.array) -> mx.array:
    return quantized_linear(
        x,
        module["weight"],
        module["scales"],
        module.get("biases"),
        group_size=module.group_size,
        bits=module.bits,
        mode=module.mode,
    )
