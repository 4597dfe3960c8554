"""Linear layers and embeddings that multiply through `ops.linear`.

They are MLX's own by name, parameters and inheritance: whatever adapts, shards or saves those takes
these.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_rgemma.ops import linear, on_linux_cpu, quantized_linear
from mlx_rgemma.ops.linear import expand_quantized, tiled, tiles_pay


class _Tiled:
    """A layer that holds its weights in tiles too, once it generates where those are faster."""

    def multiply(self, x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
        """``x @ weight.T + bias``."""
        if self.training:  # type: ignore[attr-defined]
            self.__dict__.pop("_tiles", None)
            return linear(x, weight, bias)
        if not tiles_pay(x, weight):
            return linear(x, weight, bias)
        source, tiles = self.__dict__.get("_tiles", (None, None))
        if source is not weight:
            tiles = tiled(weight)
            mx.eval(tiles)  # what is left to compute belongs to this thread
            # A plain attribute: what `nn.Module` does not know it neither saves nor trains.
            object.__setattr__(self, "_tiles", (weight, tiles))
        return linear(x, weight, bias, tiles)


class Linear(_Tiled, nn.Linear):
    """``x @ weight.T + bias``."""

    def __call__(self, x: mx.array) -> mx.array:
        return self.multiply(x, self["weight"], self.get("bias"))

    def to_quantized(self, *args: Any, **kwargs: Any) -> nn.Module:
        return _adopt(super().to_quantized(*args, **kwargs))


class _Expandable(_Tiled):
    """A quantized layer that may hold its weights in float32 beside, as no parameter of its own."""

    def expand(self) -> mx.array:
        """The weights in float32, (out, in), kept from now on."""
        expanded = self.expanded
        return self.keep_expanded(_dequantize(self)) if expanded is None else expanded

    def keep_expanded(self, expanded: mx.array) -> mx.array:
        """Use these float32 weights as long as the layer has the quantized ones that it has now."""
        mx.eval(expanded)  # what is left to compute belongs to this thread
        # A plain attribute: what `nn.Module` does not know it neither saves nor trains.
        object.__setattr__(self, "_expanded", (self["weight"], expanded))  # type: ignore[index]
        return expanded

    @property
    def expanded(self) -> mx.array | None:
        """(out, in), fp32; None where there is none, or it is that of other weights."""
        weight, expanded = self.__dict__.get("_expanded", (None, None))
        return expanded if weight is self["weight"] else None  # type: ignore[index]


class QuantizedLinear(_Expandable, nn.QuantizedLinear):
    """The same with quantized weights."""

    def __call__(self, x: mx.array) -> mx.array:
        y = _product(self, x)
        return y + self["bias"] if "bias" in self else y


class Embedding(_Tiled, nn.Embedding):
    """Rows of a table by index; `as_linear` multiplies with them."""

    def as_linear(self, x: mx.array) -> mx.array:
        return self.multiply(x, self["weight"])

    def to_quantized(self, *args: Any, **kwargs: Any) -> nn.Module:
        return _adopt(super().to_quantized(*args, **kwargs))


class QuantizedEmbedding(_Expandable, nn.QuantizedEmbedding):
    """The same with a quantized table."""

    def as_linear(self, x: mx.array) -> mx.array:
        return _product(self, x)


_OURS: dict[type, Any] = {
    nn.Linear: Linear,
    nn.QuantizedLinear: QuantizedLinear,
    nn.Embedding: Embedding,
    nn.QuantizedEmbedding: QuantizedEmbedding,
}


def adopt_layers(model: nn.Module) -> None:
    """Turn MLX's linear layers and embeddings into those of this file, where they are.

    Not done when a model is made: some of mlx-lm's quantizers look for exactly MLX's classes.
    """
    for module in model.modules():
        _adopt(module)


def _adopt(module: nn.Module) -> nn.Module:
    if type(module) in _OURS:
        module.__class__ = _OURS[type(module)]
    return module


def _dequantize(module: Any) -> mx.array:
    """The weights of a quantized layer, (out, in), fp32."""
    return expand_quantized(
        module["weight"],
        module["scales"],
        module.get("biases"),
        group_size=module.group_size,
        bits=module.bits,
        mode=module.mode,
    )


def _product(module: Any, x: mx.array) -> mx.array:
    if module.expanded is not None and on_linux_cpu():
        return module.multiply(x.astype(mx.float32), module.expanded).astype(x.dtype)
    return quantized_linear(
        x,
        module["weight"],
        module["scales"],
        module.get("biases"),
        group_size=module.group_size,
        bits=module.bits,
        mode=module.mode,
    )
