"""Compute projections of the same input as one matrix product, for decode steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

KEYS = ("weight", "scales", "biases", "bias")


class FusedProjection:
    """Several linear layers over one input, their weights concatenated.

    The parameters of the layers become views into the fused arrays, so no weight is stored twice.
    If a layer is replaced (by training or an adapter), the fused arrays are stale and the layers
    run separately.

    Attributes:
        layer: One linear layer with the parameters of all.
        splits: First outputs of the second and later layers.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        widths = [layer["weight"].shape[0] for layer in layers]
        self.splits = [sum(widths[: i + 1]) for i in range(len(widths) - 1)]
        dense = isinstance(layers[0], nn.Linear)
        fused: Any = nn.Linear(1, 1) if dense else nn.QuantizedLinear(64, 1)
        for key in KEYS:
            fused.pop(key, None)
            if key in layers[0]:
                fused[key] = mx.concatenate([layer[key] for layer in layers])
        if not dense:
            first: Any = layers[0]
            fused.group_size, fused.bits, fused.mode = first.group_size, first.bits, first.mode
        fused.eval()  # used in decode steps only
        self.layer = fused
        mx.eval(fused.parameters())
        for layer, start, width in zip(layers, [0, *self.splits], widths, strict=True):
            for key in KEYS:
                if key in layer:
                    layer[key] = fused[key][start : start + width]
            # Evaluate now: lazy arrays can only be evaluated on the thread that created them.
            mx.eval(layer.parameters())
        self.parts = [layer["weight"] for layer in layers]

    def __call__(self, x: mx.array) -> list[mx.array]:
        return list(mx.split(self.layer(x), self.splits, axis=-1))

    def is_current(self, layers: Sequence[nn.Module]) -> bool:
        """Return whether the layers' weights are still those that were fused."""
        return all(
            layer.get("weight") is part for layer, part in zip(layers, self.parts, strict=True)
        )

    @staticmethod
    def can_fuse(layers: Sequence[nn.Module]) -> bool:
        """Return whether the layers agree in type, dtype, quantization and having a bias."""
        first = layers[0]
        if not isinstance(first, nn.Linear | nn.QuantizedLinear):
            return False
        if any(type(layer) is not type(first) for layer in layers):
            return False
        if any(set(layer) & set(KEYS) != set(first) & set(KEYS) for layer in layers):
            return False
        if any(layer["weight"].dtype != first["weight"].dtype for layer in layers):
            return False
        settings = ("group_size", "bits", "mode")
        return all(
            getattr(layer, s, None) == getattr(first, s, None) for layer in layers for s in settings
        )


class FusedInputBlock(nn.Module):
    """A block whose linear layers named in `shared` read the same input."""

    shared: tuple[str, ...] = ()

    def fuse_projections(self) -> None:
        """Fuse the layers named in `shared`, if possible."""
        layers = [self[name] for name in self.shared]
        if FusedProjection.can_fuse(layers):
            # Not a submodule: fused weights are no parameters of their own.
            object.__setattr__(self, "_fused", FusedProjection(layers))

    def fused_projection(self) -> FusedProjection | None:
        """Return the fused layers while they are current."""
        fused: FusedProjection | None = self.__dict__.get("_fused")
        if fused is None or not fused.is_current([self[name] for name in self.shared]):
            return None
        return fused

    def project(self, x: mx.array) -> list[mx.array]:
        """Return the outputs of the layers named in `shared`; x is (B, L, width).

        Fused for one token per sequence only: longer inputs gain nothing, and the outputs would
        have to be copied apart.
        """
        layers = [self[name] for name in self.shared]
        one_step = x.shape[1] == 1
        if one_step and (fused := self.fused_projection()) is not None:
            return fused(x)
        trained = self.training and any(
            "weight" in layer.trainable_parameters() for layer in layers
        )
        if not one_step and trained and "_fused" in self.__dict__:
            # The next update replaces the weights, which makes the fused arrays useless.
            object.__delattr__(self, "_fused")
        return [layer(x) for layer in layers]
