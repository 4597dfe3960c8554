"""MLX's linear layers and embeddings with products by NumPy.

Subclasses of MLX's layers with the same parameters, so LoRA, sharding and saving work unchanged.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_rgemma.cpu.linear import Quantized, linear, quantized_linear
from mlx_rgemma.ops.backend import Backend, active


def _is_frozen(layer: nn.Module) -> bool:
    """Return whether no parameter of a layer has a gradient; evaluation mode does not say so."""
    return all(name in layer._no_grad for name in ("weight", "bias") if name in layer)


class Linear(nn.Linear):
    """``x @ weight.T + bias``."""

    def __call__(self, x: mx.array) -> mx.array:
        if active() is not Backend.CPU:
            return super().__call__(x)
        return linear(x, self["weight"], self.get("bias"), frozen=_is_frozen(self))

    def to_quantized(self, *args: Any, **kwargs: Any) -> nn.Module:
        return _replace_class(super().to_quantized(*args, **kwargs))


class Embedding(nn.Embedding):
    """Rows of a table by index; `as_linear` multiplies with them."""

    def as_linear(self, x: mx.array) -> mx.array:
        if active() is not Backend.CPU:
            return super().as_linear(x)
        return linear(x, self["weight"], frozen=_is_frozen(self))

    def to_quantized(self, *args: Any, **kwargs: Any) -> nn.Module:
        return _replace_class(super().to_quantized(*args, **kwargs))


class _WithDequantized:
    """A quantized layer that may keep its weights in float32 too, as no parameter of its own."""

    def packed(self) -> Quantized:
        how = {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}  # type: ignore[attr-defined]
        weight, scales = self["weight"], self["scales"]  # type: ignore[index]
        return Quantized(weight, scales, self.get("biases"), how)  # type: ignore[attr-defined]

    def cache_dequantized(self) -> mx.array:
        """Return the weights in float32, (out, in), kept from now on."""
        found = self.dequantized
        return self.keep_dequantized(self.packed().dequantized()) if found is None else found

    def keep_dequantized(self, dequantized: mx.array) -> mx.array:
        """Use these float32 weights as long as the layer has its present quantized ones."""
        mx.eval(dequantized)  # lazy arrays can only be evaluated on the thread that made them
        # A plain attribute: `nn.Module` neither saves nor trains it.
        object.__setattr__(self, "_dequantized", (self["weight"], dequantized))  # type: ignore[index]
        return dequantized

    @property
    def dequantized(self) -> mx.array | None:
        """(out, in), fp32; None where there is none, or it is that of other weights."""
        weight, found = self.__dict__.get("_dequantized", (None, None))
        return found if weight is self["weight"] else None  # type: ignore[index]

    def multiply(self, x: mx.array) -> mx.array:
        found = self.dequantized
        return quantized_linear(x, self.packed()) if found is None else linear(x, found)


class QuantizedLinear(_WithDequantized, nn.QuantizedLinear):
    """The same with quantized weights."""

    def __call__(self, x: mx.array) -> mx.array:
        if active() is not Backend.CPU:
            return super().__call__(x)
        y = self.multiply(x)
        return y + self["bias"] if "bias" in self else y


class QuantizedEmbedding(_WithDequantized, nn.QuantizedEmbedding):
    """The same with a quantized table."""

    def as_linear(self, x: mx.array) -> mx.array:
        return self.multiply(x) if active() is Backend.CPU else super().as_linear(x)


_CLASSES: dict[type, Any] = {
    nn.Linear: Linear,
    nn.QuantizedLinear: QuantizedLinear,
    nn.Embedding: Embedding,
    nn.QuantizedEmbedding: QuantizedEmbedding,
}


def replace_linear_layers(model: nn.Module) -> None:
    """Give MLX's linear layers and embeddings the classes of this file, in place.

    Not done when a model is made: some of mlx-lm's quantizers look for exactly MLX's classes.
    """
    for module in model.modules():
        _replace_class(module)


def _replace_class(module: nn.Module) -> nn.Module:
    if type(module) in _CLASSES:
        module.__class__ = _CLASSES[type(module)]
    return module
